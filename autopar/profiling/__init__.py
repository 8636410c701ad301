"""Measures the devices and links that are present: `autopar profile`.

run      the whole of it           ops      curves by size, attention, launches, the optimizer
cases    which ops, which sizes    links    collectives by kind, group and bytes
clock    how a call is timed       spec     from measurements to a ClusterSpec
"""
