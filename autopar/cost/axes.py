"""The axes of a mesh, and how their groups lie over the levels of a cluster's network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from autopar.cluster import ClusterSpec
from autopar.errors import ClusterSpecError


@dataclass(frozen=True)
class MeshAxis:
    """One axis of a mesh: its groups are `size` ranks, `stride` apart."""

    size: int
    stride: int


@dataclass(frozen=True)
class Span:
    """How the worst placed group of an axis lies over the nodes, or over other units.

    per_node: its members in the node that has fewest of them.
    """

    nodes: int
    per_node: int


@dataclass(frozen=True)
class Crossing:
    """What the worst placed group of an axis has to do with one level of links.

    level: index of the link. units: of the level below (devices, nodes, racks) in which it has members. members: of it
    in the unit of the level below that has fewest. hops: of a ring through all members, those that cross this level and
    no higher one; the last one, which closes the ring, is not counted.
    """

    level: int
    units: int
    members: int
    hops: int


def mesh_axes(cluster: ClusterSpec, mesh_shape: Sequence[int]) -> tuple[MeshAxis, ...]:
    """The axes of a row-major mesh over all devices of the cluster; ClusterSpecError if the counts differ."""
    if any(size < 1 for size in mesh_shape) or math.prod(mesh_shape) != cluster.devices:
        raise ClusterSpecError(
            f"a mesh of {tuple(mesh_shape)} has {math.prod(mesh_shape)} ranks, cluster {cluster.name!r} has "
            f"{cluster.devices}; choose sizes whose product is {cluster.devices}"
        )
    return tuple(MeshAxis(size, math.prod(mesh_shape[i + 1 :])) for i, size in enumerate(mesh_shape))


@cache
def axis_span(axis: MeshAxis, cluster: ClusterSpec) -> Span:
    """How the group of the axis that touches most nodes lies over them."""
    if axis.size > 1 and cluster.devices % (axis.size * axis.stride):
        raise ClusterSpecError(
            f"axis {axis} does not fit into the {cluster.devices} devices of cluster {cluster.name!r}"
        )
    return _over_units(axis, cluster.devices_per_node, cluster.devices)


@cache
def axis_crossings(axis: MeshAxis, cluster: ClusterSpec) -> tuple[Crossing, ...]:
    """The levels of links that the worst placed group of an axis crosses, innermost first."""
    axis_span(axis, cluster)  # refuses an axis that does not fit
    spans = [Span(axis.size, 1)]
    spans += [_over_units(axis, unit, cluster.devices) for unit in cluster.level_devices]
    found = []
    for level, (below, above) in enumerate(itertools.pairwise(spans)):
        hops = below.nodes - above.nodes
        if hops > 0:
            found.append(Crossing(level, below.nodes, below.per_node, hops))
    return tuple(found)


@cache
def _over_units(axis: MeshAxis, unit: int, devices: int) -> Span:
    """The span over units of so many devices. Groups whose first members stand alike in a unit lie alike."""
    if axis.stride % unit == 0:
        return Span(axis.size, 1)
    group = axis.size * axis.stride
    if unit % axis.stride == 0 and (group % unit == 0 or unit % group == 0):  # no group lies askew
        return Span(max(1, group // unit), min(axis.size, unit // axis.stride))
    firsts = {
        (base * group + offset) % unit
        for base in range(_period(group, unit, devices))
        for offset in range(min(axis.stride, unit))
    }
    steps = np.arange(axis.size) * axis.stride
    worst = Span(1, axis.size)
    for first in firsts:
        members = np.bincount((first + steps) // unit)
        members = members[members > 0]
        span = Span(len(members), int(members.min()))
        if (span.nodes, -span.per_node) > (worst.nodes, -worst.per_node):
            worst = span
    return worst


def _period(group: int, unit: int, devices: int) -> int:
    """After how many blocks of `group` ranks the place of a block in its unit repeats, or the cluster ends."""
    return min(math.lcm(group, unit), devices) // group or 1
