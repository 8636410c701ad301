"""Times of collectives between the processes that torchrun started: by kind, size of group and bytes.

Groups of one size lie side by side and work at the same time, as the groups of a mesh axis do in a program. A
collective has taken as long as on the slowest rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from autopar.curves import CollectiveCurve, rising
from autopar.profiling.clock import Clock, lower_quartile

c10d = torch.ops._c10d_functional
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
WARM_UP_CALLS, LEAST_CALLS, MOST_CALLS = 3, 6, 60

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Groups:
    """Groups of `ranks` processes; `name`: the one that this process is in. inside: whether they stay in their node."""

    ranks: int
    inside: bool
    name: str


def all_groups(world: int, per_node: int) -> list[Groups]:
    """Groups of every size that a mesh axis can have inside a node, and with one member a node.

    To be called on all ranks at once.
    """
    nodes, rank = world // per_node, dist.get_rank()
    found = []
    for ranks in _divisors(per_node):
        blocks = [list(range(start, start + ranks)) for start in range(0, world, ranks)]
        found.append(_made(blocks, rank, inside=True))
    for count in _divisors(nodes):
        starts = [s for s in range(world) if s // per_node % count == 0]
        found.append(_made([[s + i * per_node for i in range(count)] for s in starts], rank, inside=False))
    return found


def _made(blocks: list[list[int]], rank: int, *, inside: bool) -> Groups:
    name = ""
    for block in blocks:
        group = dist.new_group(block)
        if rank in block:
            name = group.group_name
    return Groups(len(blocks[0]), inside, name)


def _divisors(count: int) -> list[int]:
    return [d for d in range(2, count + 1) if count % d == 0]


def measure_collectives(clock: Clock, groups: Groups, quick: bool, progress: Progress) -> list[CollectiveCurve]:
    """A curve per kind in groups of this size. To be called on all ranks at once."""
    sizes = [1 << k for k in ((10, 16, 20) if quick else (10, 14, 17, 20, 22, 24, 26))]
    found = []
    for kind in KINDS:
        progress(f"{kind} of {groups.ranks} ranks {'inside a node' if groups.inside else 'between nodes'}")
        points = [(float(nbytes), _collective_s(clock, kind, groups, nbytes)) for nbytes in _whole(sizes, groups)]
        found.append(CollectiveCurve(kind, groups.ranks, rising(points)))
    return found


def _whole(sizes: list[int], groups: Groups) -> Iterator[int]:
    """Sizes of which each rank's share is a whole number of float32."""
    unit = 4 * groups.ranks
    return (max(1, round(nbytes / unit)) * unit for nbytes in sizes)


def _collective_s(clock: Clock, kind: str, groups: Groups, nbytes: int) -> float:
    call = _call(clock, kind, groups, nbytes)
    for _ in range(WARM_UP_CALLS):
        call()
    first = _agreed(clock, [_timed(clock, call)])[0]
    calls = max(LEAST_CALLS, min(MOST_CALLS, round(clock.budget_s / first)))
    return lower_quartile(_agreed(clock, [_timed(clock, call) for _ in range(calls)]))


def _timed(clock: Clock, call: Callable[[], torch.Tensor]) -> float:
    clock.synchronize()
    began = time.perf_counter()
    call()
    clock.synchronize()
    return time.perf_counter() - began


def _agreed(clock: Clock, seconds: list[float]) -> list[float]:
    """Each time as it was on the slowest rank of all; the same list on all ranks."""
    times = torch.tensor(seconds, dtype=torch.float64, device=clock.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return [float(t) for t in times.cpu()]


def _call(clock: Clock, kind: str, groups: Groups, nbytes: int) -> Callable[[], torch.Tensor]:
    """The functional collective of an emitted program; nbytes as the cost model counts them."""
    ranks, name = groups.ranks, groups.name
    whole = torch.ones(nbytes // 4, device=clock.device)
    share = torch.ones(nbytes // 4 // ranks, device=clock.device)
    rows = [len(share)] * ranks
    start: dict[str, Callable[[], torch.Tensor]] = {
        "all_reduce": lambda: c10d.all_reduce(whole, "sum", name),
        "all_gather": lambda: c10d.all_gather_into_tensor(share, ranks, name),
        "reduce_scatter": lambda: c10d.reduce_scatter_tensor(whole, "sum", ranks, name),
        "all_to_all": lambda: c10d.all_to_all_single(whole, rows, rows, name),
    }
    return lambda: c10d.wait_tensor(start[kind]())


def mean_over_ranks(clock: Clock, values: list[float]) -> list[float]:
    """The mean over all ranks, of measurements that every rank made at the same time."""
    total = torch.tensor(values, dtype=torch.float64, device=clock.device)
    dist.all_reduce(total)
    return [float(v) / dist.get_world_size() for v in total.cpu()]
