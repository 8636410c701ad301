"""The search: which mesh, then (by the solver) which placement of everything on it.

For every mesh shape that the device count allows, the problem is stated and solved under
the memory limit; the best plan wins, and the smallest of the proven bounds bounds them
all. The winner is emitted and its memory simulated tensor by tensor; should that exceed
the limit (the solver's memory model is coarser), the solver is asked for the next leaner
plan until it fits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autopar.cluster import ClusterSpec
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.errors import AutoparError, Infeasible, PinError
from autopar.memory_types import MemoryEstimate
from autopar.pins import PinRequest, parse_pins, resolve_pins
from autopar.placements import State
from autopar.plan_types import Decisions
from autopar.pricing import Price, price
from autopar.sharding import Pins, ShardingProblem, build_problem
from autopar.solver import InfeasibleProblem, solve
from autopar.trace import Trace

Progress = Callable[[str], None]
MemoryOf = Callable[[Decisions, tuple[int, ...], CostModel], MemoryEstimate]

DEFAULT_TIME_LIMIT_S = 60.0

_GAP = 1e-4
_MAX_LEANER = 24


@dataclass(frozen=True)
class SearchSettings:
    """What the search is asked for.

    memory_of: simulated memory of the program that decisions give (the code generator knows).
    fixed_params: parameter states that must stay (a program that is already running).
    """

    cluster: ClusterSpec
    optimizer: OptimizerSpec
    memory_limit_bytes: int
    memory_of: MemoryOf
    pin: Mapping[str, Any] | None = None
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    fixed_params: Mapping[str, State] | None = None
    fixed_mesh: tuple[int, ...] | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class MeshResult:
    """What the search found on one mesh: nothing (status "infeasible") or decisions with their price and proof."""

    mesh: tuple[int, ...]
    status: str
    bound_s: float | None = None
    decisions: Decisions | None = None
    price: Price | None = None
    memory: MemoryEstimate | None = None
    unruled: tuple[str, ...] = ()
    needed_bytes: int | None = None
    binding: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """The best mesh, every mesh that was tried, and the proven gap over all of them."""

    best: MeshResult
    tried: tuple[MeshResult, ...]
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


def search(trace: Trace, settings: SearchSettings) -> SearchResult:
    """Find the fastest plan that fits; raises Infeasible or PinError."""
    began = time.perf_counter()
    request = parse_pins(settings.pin, settings.cluster.devices)
    _check_batch(request, trace)
    meshes = _meshes(request, settings)
    tried: list[MeshResult] = []
    for index, mesh in enumerate(meshes):
        now = time.perf_counter()
        share = max(0.0, began + settings.time_limit_s - now) / (len(meshes) - index)
        found = _search_mesh(trace, mesh, request, settings, now + share)
        tried.append(found)
        if settings.progress:
            text = f"{found.price.step_time_s * 1e3:.3f} ms" if found.price else found.status
            settings.progress(f"mesh {'x'.join(map(str, mesh)) or '1'}: {text} ({index + 1} of {len(meshes)})")
    fitting = [t for t in tried if t.price is not None]
    if not fitting:
        raise _infeasible(tried, settings)
    best = min(fitting, key=lambda t: t.price.step_time_s)  # type: ignore[union-attr]
    assert best.price is not None
    objective = best.price.step_time_s
    bound = min([objective, *(t.bound_s for t in tried if t.bound_s is not None)])
    gap = (objective - bound) / objective if objective else 0.0
    status = "optimal" if gap <= _GAP * 1.01 else "feasible"
    return SearchResult(best, tuple(tried), bound, gap, status, time.perf_counter() - began)


def _meshes(request: PinRequest, settings: SearchSettings) -> list[tuple[int, ...]]:
    if settings.fixed_mesh is not None:
        return [settings.fixed_mesh]
    if request.mesh is not None:
        return [request.mesh]
    meshes = candidate_meshes(settings.cluster.devices, settings.cluster)
    axes = {len(state) for _, state in request.params}
    return [m for m in meshes if not axes or len(m) in axes] or meshes


def _check_batch(request: PinRequest, trace: Trace) -> None:
    data = 1
    for size, role in zip(request.mesh or (), request.roles, strict=False):
        data *= size if role == "dp" else 1
    batch = next((i.shape[0] for i in trace.inputs if i.batch_dim == 0), None)
    if batch is not None and batch % data:
        raise PinError(f"the global batch of {batch} does not divide by dp={data}; change the batch or the pin")


def _search_mesh(
    trace: Trace, mesh: tuple[int, ...], request: PinRequest, settings: SearchSettings, deadline: float
) -> MeshResult:
    costs = CostModel(settings.cluster, mesh)
    pins = _with_fixed(resolve_pins(request, trace, mesh), settings.fixed_params)
    stated = build_problem(trace, costs, settings.optimizer, capacity_bytes=settings.memory_limit_bytes, pins=pins)
    capacity = settings.memory_limit_bytes
    bound: float | None = None
    for _ in range(_MAX_LEANER):
        problem = replace(stated.problem, capacity_bytes=capacity)
        try:
            result = solve(problem, time_limit_s=max(0.0, deadline - time.perf_counter()), gap=_GAP)
        except InfeasibleProblem as error:
            return _leanest(trace, stated, costs, settings, error, bound)
        bound = result.bound_s if bound is None else bound
        decisions = stated.decisions(result.solution)
        memory = settings.memory_of(decisions, mesh, costs)
        if memory.peak_bytes <= settings.memory_limit_bytes:
            priced = price(trace, decisions, costs, settings.optimizer)
            _check_price(priced, result.objective_s, stated)
            return MeshResult(mesh, result.status, bound, decisions, priced, memory, stated.unruled)
        capacity = min(capacity, result.peak_bytes) - 1
    return MeshResult(mesh, "infeasible", bound, needed_bytes=memory.peak_bytes, binding=memory.node)


def _leanest(
    trace: Trace,
    stated: ShardingProblem,
    costs: CostModel,
    settings: SearchSettings,
    error: InfeasibleProblem,
    bound_s: float | None,
) -> MeshResult:
    """The solver's memory model has no plan that fits: its leanest may fit when simulated, else says what it takes."""
    if error.leanest is None:
        return MeshResult(stated.mesh, "infeasible", bound_s)
    decisions = stated.decisions(error.leanest)
    memory = settings.memory_of(decisions, stated.mesh, costs)
    if memory.peak_bytes > settings.memory_limit_bytes:
        where = f"{memory.phase}: {memory.node}"
        return MeshResult(stated.mesh, "infeasible", bound_s, needed_bytes=memory.peak_bytes, binding=where)
    priced = price(trace, decisions, costs, settings.optimizer)
    bound = bound_s if bound_s is not None else 0.0
    return MeshResult(stated.mesh, "feasible", bound, decisions, priced, memory, stated.unruled)


def _check_price(priced: Price, objective_s: float, stated: ShardingProblem) -> None:
    """The solver's objective must be what the plan costs when it is priced from scratch."""
    if abs(priced.step_time_s - objective_s) > 1e-6 * max(objective_s, 1e-12):
        raise AutoparError(
            f"internal error: on mesh {stated.mesh} the solver says {objective_s!r} s, the plan costs "
            f"{priced.step_time_s!r} s; please report this"
        )


def _with_fixed(pins: Pins, fixed: Mapping[str, State] | None) -> Pins:
    if fixed is None:
        return pins
    return replace(pins, allow_param=lambda param, state: state == fixed[param.fqn])


def _infeasible(tried: list[MeshResult], settings: SearchSettings) -> Infeasible:
    known = [t for t in tried if t.needed_bytes is not None]
    limit = settings.memory_limit_bytes
    if not known:
        return Infeasible("no plan satisfies the pins together; remove one")
    best = min(known, key=lambda t: t.needed_bytes or 0)
    assert best.needed_bytes is not None
    where = f" (at {best.binding})" if best.binding else ""
    return Infeasible(
        f"no plan fits {_gb(limit)} per device: the leanest needs {_gb(best.needed_bytes)}"
        f" ({best.needed_bytes} bytes) on mesh {'x'.join(map(str, best.mesh)) or '1'}{where}; raise the limit to that,"
        " use more devices, or a smaller batch",
        needed_bytes=best.needed_bytes,
        where=best.binding,
    )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.3g} MiB"
