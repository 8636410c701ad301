"""What a collective costs: an alpha-beta model per algorithm and per level of the network.

Sources. [T] Thakur, Rabenseifner, Gropp, "Optimization of collective communication
operations in MPICH" (2005): steps and bytes of each algorithm. [N] NCCL's own model
(src/graph/tuning.cc) and its note on bus bandwidth (nccl-tests, doc/PERFORMANCE.md):
of the hops of a ring, those that leave a node pay the network's latency, the rest the
latency inside. [S] Sanders, Speck, Traeff, "Two-tree algorithms" (2009).

An axis of the mesh is a set of groups. How one group lies over the nodes decides:

* Inside a node, links[0] counts. Groups of the same axis share a switched fabric, where
  each device has its own bandwidth.
* With one member a node, links[1] counts. `bytes_per_s` is per device, so groups side
  by side, one for each device of a node, do not share it further.
* With several members a node, and several nodes, a ring enters and leaves each node
  once, and cut into as many rings as there are members it uses the network share of
  each: m members give m x links[1], at most links[0].

Where `autopar profile` measured this collective in groups of this size on this link, its curve goes before the model.
A group with several members on each of several nodes is always priced by the model.

nbytes is the larger of a rank's input and output: the full tensor for all_reduce,
all_gather and reduce_scatter, the local one for all_to_all, broadcast and permute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from autopar.cluster import ClusterSpec
from autopar.curves import CollectiveCurve
from autopar.errors import ClusterSpecError


@dataclass(frozen=True)
class MeshAxis:
    """One axis of a mesh: its groups are `size` ranks, `stride` apart."""

    size: int
    stride: int


@dataclass(frozen=True)
class Span:
    """How the worst placed group of an axis lies over the nodes.

    per_node: its members in the node that has fewest of them.
    """

    nodes: int
    per_node: int


@dataclass(frozen=True)
class _Path:
    """Numbers that the formulas share. Bandwidths per rank, one direction.

    ring_bytes_per_s: of data that goes around all members.
    """

    size: int
    span: Span
    intra_latency_s: float
    inter_latency_s: float
    intra_bytes_per_s: float
    inter_bytes_per_s: float

    @property
    def ring_bytes_per_s(self) -> float:
        if self.span.nodes == 1:
            return self.intra_bytes_per_s
        return min(self.intra_bytes_per_s, self.span.per_node * self.inter_bytes_per_s)

    @property
    def ring_latency_s(self) -> float:
        """Once around: size - 1 hops, of which nodes - 1 leave a node [N]."""
        inter = self.span.nodes - 1
        return (self.size - 1 - inter) * self.intra_latency_s + inter * self.inter_latency_s

    @property
    def tree_latency_s(self) -> float:
        """From the root to the last rank: a binary tree over nodes, and one inside each."""
        inside = _log2(math.ceil(self.size / self.span.nodes))
        return inside * self.intra_latency_s + _log2(self.span.nodes) * self.inter_latency_s


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
    worst = Span(1, axis.size)
    for base in range(cluster.devices):
        if base // axis.stride % axis.size:
            continue  # not the first member of its group
        ranks = range(base, base + axis.size * axis.stride, axis.stride)
        if ranks[-1] >= cluster.devices:
            raise ClusterSpecError(
                f"axis {axis} does not fit into the {cluster.devices} devices of cluster {cluster.name!r}"
            )
        nodes = [rank // cluster.devices_per_node for rank in ranks]
        span = Span(len(set(nodes)), min(nodes.count(node) for node in set(nodes)))
        if (span.nodes, -span.per_node) > (worst.nodes, -worst.per_node):
            worst = span
    return worst


@lru_cache(maxsize=1 << 16)
def collective_time_s(kind: str, nbytes: float, axis: MeshAxis, cluster: ClusterSpec) -> float:
    """Seconds of one collective on one axis, launch included; 0 on an axis of size 1.

    kind: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast" or
    "permute" (each rank sends its tensor to the next). nbytes: see the module docstring.
    """
    if kind not in _FORMULAS:
        raise ValueError(f"unknown collective {kind!r}; kinds are {', '.join(_FORMULAS)}")
    if not (nbytes >= 0 and math.isfinite(nbytes)):
        raise ValueError(f"nbytes of {kind} is {nbytes}; give a finite number of at least 0")
    if axis.size == 1:
        return 0.0
    curve = _measured(kind, axis, cluster)
    if curve is not None:
        return curve.seconds(nbytes)
    return cluster.collective_launch_s + _FORMULAS[kind](_path(axis, cluster), nbytes)


@cache
def _measured(kind: str, axis: MeshAxis, cluster: ClusterSpec) -> CollectiveCurve | None:
    span = axis_span(axis, cluster)
    if span.nodes > 1 and span.per_node > 1:
        return None
    link = cluster.inter_link if span.nodes > 1 else cluster.intra_link
    return next((c for c in link.measured if (c.kind, c.ranks) == (kind, axis.size)), None)


@cache
def _path(axis: MeshAxis, cluster: ClusterSpec) -> _Path:
    span, intra = axis_span(axis, cluster), cluster.intra_link
    inter = cluster.inter_link if span.nodes > 1 else intra
    return _Path(
        axis.size, span, intra.latency_s, inter.latency_s, intra.reached_bytes_per_s, inter.reached_bytes_per_s
    )


def _all_gather_s(path: _Path, nbytes: float) -> float:
    """Ring [T]: (n-1) steps, (n-1)/n of the full tensor. NCCL has no other for most sizes [N]."""
    return path.ring_latency_s + (path.size - 1) / path.size * nbytes / path.ring_bytes_per_s


def _all_reduce_s(path: _Path, nbytes: float) -> float:
    """The faster of ring (reduce-scatter, all-gather) [T] and double binary tree, 2 x nbytes up and down [S]."""
    ring = 2 * _all_gather_s(path, nbytes)
    tree = 2 * (path.tree_latency_s + nbytes / path.ring_bytes_per_s)
    return min(ring, tree)


def _all_to_all_s(path: _Path, nbytes: float) -> float:
    """Pairwise exchange [T]: each rank keeps 1/n of its local tensor and sends 1/n to each other rank.

    The share for other nodes goes over the rank's own share of the network, at the same
    time as the rest goes inside.
    """
    inside, outside = path.span.per_node - 1, path.size - path.span.per_node
    each = nbytes / path.size
    latency = inside * path.intra_latency_s + outside * path.inter_latency_s
    return latency + max(inside * each / path.intra_bytes_per_s, outside * each / path.inter_bytes_per_s)


def _broadcast_s(path: _Path, nbytes: float) -> float:
    """The faster of a pipelined ring [N] and a binomial tree, which sends the whole tensor at each level [T]."""
    ring = path.ring_latency_s + nbytes / path.ring_bytes_per_s
    inside, outside = _log2(math.ceil(path.size / path.span.nodes)), _log2(path.span.nodes)
    tree = path.tree_latency_s + nbytes * (inside / path.intra_bytes_per_s + outside / path.inter_bytes_per_s)
    return min(ring, tree)


def _permute_s(path: _Path, nbytes: float) -> float:
    """One step of a ring of single transfers. Some member sends to another node if the axis spans several."""
    if path.span.nodes == 1:
        return path.intra_latency_s + nbytes / path.intra_bytes_per_s
    slowest = min(path.intra_bytes_per_s, path.inter_bytes_per_s)
    return max(path.intra_latency_s, path.inter_latency_s) + nbytes / slowest


def _log2(count: int) -> int:
    return (count - 1).bit_length()


_FORMULAS: dict[str, Callable[[_Path, float], float]] = {
    "all_reduce": _all_reduce_s,
    "all_gather": _all_gather_s,
    "reduce_scatter": _all_gather_s,  # the same steps and bytes backwards [T]
    "all_to_all": _all_to_all_s,
    "broadcast": _broadcast_s,
    "permute": _permute_s,
}
COLLECTIVES = tuple(_FORMULAS)
