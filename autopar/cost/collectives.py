"""What a collective costs: alpha-beta models of the algorithms that NCCL chooses from, and the fastest of them.

Sources. [T] Thakur, Rabenseifner, Gropp, "Optimization of collective communication
operations in MPICH" (2005): steps and bytes of each algorithm. [N] NCCL's own model
(src/graph/tuning.cc) and its note on bus bandwidth (nccl-tests, doc/PERFORMANCE.md).
[S] Sanders, Speck, Traeff, "Two-tree algorithms" (2009). [V] Vidur's profiles of a DGX H100
(Agrawal et al. 2024; data/profiling/network/h100_dgx): all-reduces of 2 KB to 64 MB.

An axis of the mesh is a set of groups. How one group lies over the units of each level
of links (devices, nodes, racks: `autopar.cost.axes`) decides what each level carries:

* A ring enters and leaves every unit once, and is cut into as many rings as the group has members there, so that it
  uses the network share of each: m members give m x the link. The slowest level on the way binds.
* `bytes_per_s` of a link is per device, so groups side by side, one for each device of a node, do not share it further;
  what a level cannot carry if all devices send at once is its oversubscription.
* A tree is a chain inside a node and a double binary tree over the nodes [N].
* Where switches add up (`LinkSpec.reduces`), an all-reduce inside a node crosses them once each way; over several
  nodes, each device then reduces its share over the network, mostly at the same time.

Each algorithm sends by the protocol that is fastest for the size [N]: LL flags every 8 bytes (soon there, little
bandwidth), LL128 every 128 bytes (inside a node only), Simple none (all of the bandwidth, but a hop takes several
times longer). The latency of a link is that of LL128. gloo has one protocol.

Where `autopar profile` measured this collective in groups of this size on this link, its curve goes before the model.
A group with several members on each of several nodes is always priced by the model.

nbytes is the larger of a rank's input and output: the full tensor for all_reduce,
all_gather and reduce_scatter, the local one for all_to_all, broadcast, permute and send.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import TypeAlias

from autopar.cluster import ClusterSpec
from autopar.cost.axes import Crossing, MeshAxis, Span, axis_crossings, axis_span, mesh_axes
from autopar.curves import CollectiveCurve
from autopar.hardware import LinkSpec

__all__ = ["COLLECTIVES", "MeshAxis", "Span", "axis_span", "collective_time_s", "mesh_axes"]


Ways: TypeAlias = tuple[tuple[float, float], ...]  # by protocol: seconds before the first byte, bytes a second


@dataclass(frozen=True)
class Protocol:
    """bandwidth: share of a link's. inside, between: factors of its latency, inside a node and between nodes."""

    bandwidth: float
    inside: float
    between: float


# [N]: microseconds a hop over NVLink 0.6, 1.9, 3.4, over the network 2.7, 4.0, 14. LL128 has 120 of 128 bytes, in
# NCCL's own account 0.92; LL 4 of 8, but inside a node no more than 87 GB/s of a ring's 235 or 351, over the network 20
# of 340. Over the network LL128 needs adapters that keep the order of writes, which is not counted on.
_LL, _LL128, SIMPLE = Protocol(0.25, 0.32, 0.68), Protocol(0.92, 1.0, 1.0), Protocol(1.0, 1.8, 3.5)
_INSIDE, _BETWEEN = (_LL, _LL128, SIMPLE), (Protocol(0.06, 0.32, 0.68), SIMPLE)
_GLOO = (Protocol(1.0, 1.0, 1.0),)


def _protocols(kind: str, nodes: int) -> tuple[Protocol, ...]:
    if kind == "cpu":
        return _GLOO
    return _INSIDE if nodes == 1 else _BETWEEN


# Of an all-reduce in the switches, bytes a second over the wire's, and what it costs beyond its launch. [V] 31 us at
# 0.5 MB, 322 us at 64 MB; The Ultra-Scale Playbook (2025) 436 GB/s of bus bandwidth, which is 0.55 of 450 GB/s
_IN_SWITCH_SHARE = 0.54
_IN_SWITCH_S = 2e-5  # [V]; [N] has 23 us instead of a ring's 8
_NOT_HIDDEN = 0.25  # of the shorter of both parts, in the switches and over the network: two nodes give 362 GB/s


@dataclass(frozen=True)
class _Step:
    """A crossing and its link. Bandwidths are per rank, one direction."""

    crossing: Crossing
    link: LinkSpec

    @property
    def inside(self) -> bool:
        return self.crossing.level == 0

    def latency_s(self, protocol: Protocol) -> float:
        """Of one hop."""
        return self.link.latency_s * (protocol.inside if self.inside else protocol.between)

    @property
    def ring_bytes_per_s(self) -> float:
        """Of data that goes around all members: all rings of a unit together."""
        return self.crossing.members * self.link.reached_bytes_per_s


@dataclass(frozen=True)
class _Path:
    """What the formulas share: the levels that the group crosses, innermost first.

    senders_share: by how much more than its share of the network a device has when only the last members of groups in
    a node send to the next node.
    """

    size: int
    span: Span
    steps: tuple[_Step, ...]
    protocols: tuple[Protocol, ...]
    senders_share: float

    @cached_property
    def ring_bytes_per_s(self) -> float:
        """Of data that goes around all members."""
        return min(step.ring_bytes_per_s for step in self.steps)

    @cached_property
    def rings(self) -> Ways:
        """Once around: size - 1 hops, of which units - 1 leave a unit [N]."""
        return self._ways(lambda protocol: sum(s.crossing.hops * s.latency_s(protocol) for s in self.steps))

    @cached_property
    def trees(self) -> Ways:
        """From the root to the last rank: a chain inside a node, a binary tree over nodes [N] and what joins them."""
        chain = self.size // self.span.nodes - 1
        depths = [(chain if s.inside else _log2(s.crossing.hops + 1), s) for s in self.steps]
        return self._ways(lambda protocol: sum(depth * s.latency_s(protocol) for depth, s in depths))

    def _ways(self, latency_s: Callable[[Protocol], float]) -> Ways:
        return tuple((latency_s(p), self.ring_bytes_per_s * p.bandwidth) for p in self.protocols)

    @cached_property
    def outside(self) -> tuple[_Step, ...]:
        """The levels between nodes."""
        return tuple(step for step in self.steps if not step.inside)


@lru_cache(maxsize=1 << 16)
def collective_time_s(kind: str, nbytes: float, axis: MeshAxis, cluster: ClusterSpec) -> float:
    """Seconds of one collective on one axis, launch included; 0 on an axis of size 1.

    kind: "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "permute" (each rank sends its tensor
    to the next, the last one to the first) or "send" (each rank but the last). nbytes: see the module docstring.
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
    kinds = ("send", "permute") if kind == "send" else (kind,)
    return next((c for k in kinds for c in link.measured if (c.kind, c.ranks) == (k, axis.size)), None)


@cache
def _path(axis: MeshAxis, cluster: ClusterSpec) -> _Path:
    span = axis_span(axis, cluster)
    steps = tuple(_Step(c, cluster.links[c.level]) for c in axis_crossings(axis, cluster))
    share = 1.0
    if span.nodes > 1:  # those that send to another node have the adapters to themselves
        per_node = cluster.devices_per_node
        senders = max(per_node // span.per_node, 1)
        share = min(per_node / (cluster.inter_link.rails or per_node), per_node / senders)
    return _Path(axis.size, span, steps, _protocols(cluster.device.kind, span.nodes), share)


def _fastest(ways: Ways, nbytes: float) -> float:
    """Seconds by the best protocol."""
    return min(latency_s + nbytes / bytes_per_s for latency_s, bytes_per_s in ways)


def _all_gather_s(path: _Path, nbytes: float) -> float:
    """Ring [T]: (n-1) steps, (n-1)/n of the full tensor. NCCL has no other for most sizes [N]."""
    return _fastest(path.rings, (path.size - 1) / path.size * nbytes)


def _all_reduce_s(path: _Path, nbytes: float) -> float:
    """The fastest of ring (reduce-scatter, all-gather) [T], double binary tree, 2 x nbytes up and down [S], and, where
    there is one, the sum in the switches."""
    return min(_all_reduces_s(path, nbytes))


def _all_reduces_s(path: _Path, nbytes: float) -> Iterator[float]:
    yield 2 * _all_gather_s(path, nbytes)
    yield 2 * min(_in_pieces_s(latency_s, nbytes / bytes_per_s) for latency_s, bytes_per_s in path.trees)
    inner = path.steps[0]
    if inner.inside and inner.link.reduces:
        yield _in_switch_s(path, inner, nbytes)


def _in_pieces_s(latency_s: float, moving_s: float) -> float:
    """[S]: a pipeline that takes `latency_s` for its first byte, `moving_s` at full rate, in as many pieces as pay."""
    return latency_s + moving_s + 2 * math.sqrt(latency_s * moving_s)


def _in_switch_s(path: _Path, inner: _Step, nbytes: float) -> float:
    """Summed in the switches of a node; over several nodes, each device sums its share of it over the network."""
    inside = nbytes / (inner.link.bytes_per_s * _IN_SWITCH_SHARE)
    if not path.outside:
        return _IN_SWITCH_S + inside
    nodes, share = path.span.nodes, nbytes / path.span.per_node
    slowest = min(s.ring_bytes_per_s for s in path.outside) / path.span.per_node
    across = 2 * (nodes - 1) / nodes * share / slowest
    latency = 2 * sum(_log2(s.crossing.hops + 1) * s.latency_s(SIMPLE) for s in path.outside)
    return _IN_SWITCH_S + _in_pieces_s(latency, max(inside, across)) + _NOT_HIDDEN * min(inside, across)


def _all_to_all_s(path: _Path, nbytes: float) -> float:
    """Pairwise exchange [T]: each rank keeps 1/n of its local tensor and sends 1/n to each other rank.

    The share for other units goes over the rank's own share of the links between them, at the same time as the rest
    goes inside.
    """
    each = nbytes / path.size
    latency = seconds = 0.0
    for step, beyond in zip(path.steps, (*path.steps[1:], None), strict=True):
        within = beyond.crossing.members if beyond else path.size  # ranks that this level or a lower one reaches
        latency += (within - step.crossing.members) * step.link.latency_s
        carried = (within if step.inside else path.size) - step.crossing.members
        seconds = max(seconds, carried * each / step.link.reached_bytes_per_s)
    return latency + seconds


def _broadcast_s(path: _Path, nbytes: float) -> float:
    """The faster of a pipelined ring [N] and a binomial tree, which sends the whole tensor at each level [T]."""
    depths = [
        (_log2(math.ceil(path.size / path.span.nodes) if s.inside else s.crossing.hops + 1), s) for s in path.steps
    ]
    whole_s = nbytes * sum(depth / step.link.reached_bytes_per_s for depth, step in depths)
    tree = min(sum(d * s.latency_s(p) for d, s in depths) + whole_s / p.bandwidth for p in path.protocols)
    return min(_fastest(path.rings, nbytes), tree)


def _permute_s(path: _Path, nbytes: float) -> float:
    """One step of single transfers, by the worst of them: some member sends over every level that the axis crosses.

    The network is shared by the devices of a node that send to another node at the same time.
    """
    share = path.senders_share
    slowest = min(step.link.reached_bytes_per_s * (1.0 if step.inside else share) for step in path.steps)
    return max(step.link.latency_s for step in path.steps) + nbytes / slowest


def _log2(count: int) -> int:
    return (count - 1).bit_length()


_FORMULAS: dict[str, Callable[[_Path, float], float]] = {
    "all_reduce": _all_reduce_s,
    "all_gather": _all_gather_s,
    "reduce_scatter": _all_gather_s,  # the same steps and bytes backwards [T]
    "all_to_all": _all_to_all_s,
    "broadcast": _broadcast_s,
    "permute": _permute_s,
    "send": _permute_s,
}
COLLECTIVES = tuple(_FORMULAS)
