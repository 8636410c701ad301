"""The search: which mesh, then (by the solver) which placement of everything on it.

For every mesh shape that the device count allows, the problem is stated and solved under
the memory limit; the best plan wins, and the smallest of the proven bounds bounds them
all. A mesh whose bound shows that it cannot beat the best plan so far is not searched.
The winner is emitted and its memory simulated tensor by tensor; should that exceed
the limit (the solver's memory model is coarser), the solver is asked for the next leaner
plan until it fits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from autopar.cluster import ClusterSpec
from autopar.errors import AutoparError, Infeasible, PinError
from autopar.memory_types import MemoryEstimate
from autopar.mesh_search import MeshSearch, SearchSettings
from autopar.pin_mesh import MOST_AXES
from autopar.pins import PinRequest, parse_pins
from autopar.plan_types import Decisions
from autopar.plans import Candidate
from autopar.pricing import Price, price
from autopar.solver import NothingCheaper
from autopar.trace import Trace

_MAY_RISE = 2.0  # of the gap: how far a close look may raise the bound of a first one
_OPS_FOR_THREE_AXES = 24  # two MLP layers: a quarter of a CPU second a mesh, of which 64 devices have 10
_FREE_SHARE = 0.6  # of the time limit; the rest is for the usual layouts, should nothing be proven by then


@dataclass(frozen=True)
class MeshResult:
    """The winning mesh with its decisions, their price and their simulated memory."""

    mesh: tuple[int, ...]
    decisions: Decisions
    price: Price
    memory: MemoryEstimate
    unruled: tuple[str, ...] = ()


@dataclass(frozen=True)
class SearchResult:
    """The best plan, every mesh that was tried, and the proven gap over all of them."""

    best: MeshResult
    tried: tuple[Candidate, ...]
    bound_s: float
    gap: float
    status: str
    solve_s: float


def candidate_meshes(devices: int, cluster: ClusterSpec) -> list[tuple[int, ...]]:
    """Meshes of one and two axes for a device count; () for one device.

    The inner axis of a two-axis mesh stays inside a node where nodes matter at all.
    """
    if devices == 1:
        return [()]
    pairs = [(devices // inner, inner) for inner in range(2, devices) if devices % inner == 0]
    if cluster.nodes > 1:
        pairs = [p for p in pairs if p[1] <= cluster.devices_per_node and cluster.devices_per_node % p[1] == 0]
    return [(devices,), *pairs]


def deeper_meshes(devices: int, cluster: ClusterSpec, axes: int) -> list[tuple[int, ...]]:
    """Meshes of so many axes, each of at least two ranks; those inside of the outermost stay inside a node where nodes
    matter at all."""
    if axes == 1:
        return [(devices,)] if devices > 1 else []
    inside = cluster.devices_per_node if cluster.nodes > 1 else devices
    found = []
    for outer in range(2, devices):
        rest = devices // outer
        if devices % outer == 0 and inside % rest == 0:
            found += [(outer, *inner) for inner in deeper_meshes(rest, cluster, axes - 1)]
    return found


def usual_layouts(cluster: ClusterSpec) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, pins of its variants) of the layouts that people would configure by hand."""
    devices = cluster.devices
    pairs = [m for m in candidate_meshes(devices, cluster) if len(m) == 2]
    return [
        ("DDP", [{"dp": devices, "zero": 0}]),
        ("FSDP", [{"dp": devices, "zero": 3}]),
        ("Megatron tensor parallel", [{"tp": devices, "sp": False}]),
        ("tensor and sequence parallel", [{"tp": devices, "sp": True}]),
        ("FSDP x tensor parallel", [{"dp": a, "tp": b, "zero": 3} for a, b in pairs]),
    ]


def search(trace: Trace, settings: SearchSettings) -> SearchResult:
    """Find the fastest plan that fits; raises Infeasible, PinError, and NothingCheaper if none is fast enough."""
    began = time.perf_counter()
    request = parse_pins(settings.pin, settings.cluster.devices)
    _check_batch(request, trace)
    meshes = _meshes(request, settings, sum(1 for n in trace.graph_module.graph.nodes if n.op == "call_function"))
    limit_s = settings.time_limit_s * (_FREE_SHARE if settings.free else 1.0)
    tried: list[MeshSearch] = []
    order = _most_promising_first(_stated(trace, meshes, request, settings), began + limit_s)
    for index, one in enumerate(order):
        now = time.perf_counter()
        share = max(0.0, began + limit_s - now) / min(2, len(order) - index)  # half: the first often settles the rest
        known = _fastest(tried)
        if known is not None:
            one.look_again(known, now + share)
        one.solve(now + share, known, explained=False)
        tried.append(one)
        if settings.progress:
            name = "x".join(map(str, one.mesh)) or "1"
            settings.progress(f"mesh {name}: {one.outcome()} ({index + 1} of {len(order)})")
    deadline = began + settings.time_limit_s
    usual = [] if not settings.free or _settled(tried) else _usual(trace, settings, deadline, _fastest(tried))
    best = _fastest_that_fits([*tried, *usual], deadline, settings.faster_than_s)
    if best is None and settings.faster_than_s < float("inf"):
        raise NothingCheaper(min([settings.faster_than_s, *(t.bound_s for t in tried if t.bound_s is not None)]))
    if best is None:
        raise _infeasible(tried, settings)
    return _proven(best, tried, time.perf_counter() - began)


def _stated(
    trace: Trace, meshes: list[tuple[int, ...]], request: PinRequest, settings: SearchSettings
) -> list[MeshSearch]:
    found: list[MeshSearch] = []
    for mesh in meshes:
        try:
            found.append(MeshSearch(trace, mesh, request, settings))
        except PinError:  # a parameter cannot be stored so on this mesh; perhaps on another
            if not found and mesh == meshes[-1]:
                raise
    return found


def _most_promising_first(stated: list[MeshSearch], deadline: float) -> list[MeshSearch]:
    """Meshes by what a first look proves of them: what the best one finds may settle all others.

    The mesh with the most ranks inside a node is looked at closely: it can most often do best, and what memory is
    worth there is worth knowing for the others.
    """
    if len(stated) == 1:
        return stated
    paid_s: Any = None
    gap = max(one.gap for one in stated)
    for index, one in enumerate(reversed(stated)):
        now = time.perf_counter()
        share = 2 if paid_s is None else 2 * (len(stated) - index)  # the first look finds the prices for all
        one.look(paid_s, now + max(0.0, deadline - now) / share, gap)
        if paid_s is None:
            paid_s = one.search.paid_s
    close = stated[-1]  # its bound stands; others may rise
    return sorted(stated, key=lambda one: one.search.bound_s * (1 if one is close else 1 + _MAY_RISE * gap))


def _settled(tried: list[MeshSearch]) -> bool:
    """Whether there is nothing to gain from trying more: the best plan is proven, or nothing fits."""
    best = min(t.objective_s for t in tried)
    return best == float("inf") or not any(t.bound_s is not None and t.beats(best) for t in tried)


def _usual(trace: Trace, settings: SearchSettings, deadline: float, known: MeshSearch | None) -> list[MeshSearch]:
    """The usual layouts, solved under their pins: smaller problems, so that a search that ran out of time is never
    worse than what people would configure by hand. Only those that are faster than the best plan that is known."""
    pins = [pin for _, variants in usual_layouts(settings.cluster) for pin in variants]
    found: list[MeshSearch] = []
    for index, pin in enumerate(pins):
        request = parse_pins(pin, settings.cluster.devices)
        assert request.mesh is not None
        try:
            _check_batch(request, trace)
            one = MeshSearch(trace, request.mesh, request, settings)
        except PinError:  # the batch or the sequence cannot be cut so
            continue
        now = time.perf_counter()
        best = min(([known] if known else []) + found, key=lambda t: t.objective_s, default=None)
        one.solve(now + max(0.0, deadline - now) / (len(pins) - index), best, explained=False)
        if one.decisions is not None:
            found.append(one)
    return found


def _fastest(tried: list[MeshSearch]) -> MeshSearch | None:
    return min((t for t in tried if t.decisions is not None), key=lambda t: t.objective_s, default=None)


def _fastest_that_fits(tried: list[MeshSearch], deadline: float, faster_than_s: float) -> MeshSearch | None:
    """Simulate the memory of the fastest plan; if it does not fit, ask for its next leaner one, and so on.

    Leaner is slower, so meshes that could not beat the plan that did not fit may be worth a search now.
    """
    while True:
        best = _fastest(tried)
        limit_s = faster_than_s if best is None else best.objective_s
        reopened = [t for t in tried if t.cut_off and t.cutoff_s < limit_s and t.beats(limit_s)]
        if reopened:
            reopened[0].solve(deadline, best)
        elif best is None and faster_than_s == float("inf") and any(t.unexplained for t in tried):
            next(t for t in tried if t.unexplained).explain()  # its leanest plan, simulated, may fit
        elif best is None or best.fits():
            return best
        else:
            best.lean(deadline)


def _proven(best: MeshSearch, tried: list[MeshSearch], solve_s: float) -> SearchResult:
    assert best.decisions is not None and best.memory is not None
    priced = price(best.trace, best.decisions, best.costs, best.settings.optimizer)
    _check_price(priced, best)
    objective = priced.step_time_s
    bound = min([objective, *(t.bound_s for t in tried if t.bound_s is not None)])
    gap = (objective - bound) / objective if objective else 0.0
    status = "optimal" if gap <= max(t.gap for t in tried) * 1.01 else "feasible"
    found = MeshResult(best.mesh, best.decisions, priced, best.memory, best.stated.unruled)
    rows = tuple(Candidate(t.mesh, t.status, t.objective_s if t.decisions else None, t.bound_s) for t in tried)
    return SearchResult(found, rows, bound, gap, status, solve_s)


def _meshes(request: PinRequest, settings: SearchSettings, ops: int) -> list[tuple[int, ...]]:
    """Those to be searched: what is pinned, else meshes of one and two axes; of three where the model is small, and of
    three or four where a parameter is pinned on so many."""
    if settings.fixed_mesh is not None:
        return [settings.fixed_mesh]
    if request.mesh is not None:
        return [request.mesh]
    devices, cluster = settings.cluster.devices, settings.cluster
    meshes = candidate_meshes(devices, cluster)
    axes = {len(state) for _, state in request.params}
    if axes:
        for count in sorted(axes & set(range(3, MOST_AXES + 1))):
            meshes += deeper_meshes(devices, cluster, count)
        return [m for m in meshes if len(m) in axes] or meshes
    return [*deeper_meshes(devices, cluster, 3), *meshes] if ops <= _OPS_FOR_THREE_AXES else meshes


def _check_batch(request: PinRequest, trace: Trace) -> None:
    data = 1
    for size, role in zip(request.mesh or (), request.roles, strict=False):
        data *= size if role == "dp" else 1
    batch = next((i.shape[0] for i in trace.inputs if i.batch_dim == 0), None)
    if batch is not None and batch % data:
        raise PinError(f"the global batch of {batch} does not divide by dp={data}; change the batch or the pin")


def _check_price(priced: Price, tried: MeshSearch) -> None:
    """The solver's objective must be what the plan costs when it is priced from scratch."""
    objective = tried.objective_s
    if abs(priced.step_time_s - objective) > 1e-6 * max(objective, 1e-12):
        raise AutoparError(
            f"internal error: on mesh {tried.mesh} the solver says {objective!r} s, the plan costs "
            f"{priced.step_time_s!r} s; please report this"
        )


def _infeasible(tried: list[MeshSearch], settings: SearchSettings) -> Infeasible:
    known = [t for t in tried if t.needed_bytes is not None]
    limit = settings.memory_limit_bytes
    if not known:
        return Infeasible("no plan satisfies the pins together; remove one")
    best = min(known, key=lambda t: t.needed_bytes or 0)
    assert best.needed_bytes is not None
    where = f" (at {best.binding})" if best.binding else ""
    bounds = [t.needed_bound for t in tried]
    bound = min((b for b in bounds if b is not None), default=None) if all(bounds) else None
    account = best.needed_account
    proven = ""
    if bound is not None and account and 2 * bound > account:  # less says nothing
        proven = f" (proven, by the planner's own account: within {max(0.0, 1 - bound / account):.1%} of the least)"
    return Infeasible(
        f"no plan fits {_gb(limit)} per device: the leanest needs {_gb(best.needed_bytes)}"
        f" ({best.needed_bytes} bytes) on mesh {'x'.join(map(str, best.mesh)) or '1'}{where}{proven}",
        needed_bytes=best.needed_bytes,
        where=best.binding,
        bound_bytes=bound,
        short_by_bytes=max(0, best.needed_bytes - limit),
        advice="raise the limit to that, use more devices, or a smaller batch",
    )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.3g} MiB"
