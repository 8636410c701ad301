"""Costs in seconds and FLOPs, from the cluster description alone.

compute      per-op class, FLOPs and time        collectives  alpha-beta per algorithm and link level
optimizer    state and time of the step          model        all of it for one mesh on one cluster
"""
