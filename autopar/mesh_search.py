"""The search on one mesh: its problem, the best plan so far, what is proven, and what it would take to fit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autopar.cluster import ClusterSpec
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.dataflow import ViewMaps
from autopar.dealing import fold_of
from autopar.memory_types import MemoryEstimate
from autopar.pins import Forbidden, PinRequest, resolve_pins
from autopar.pins_by_stage import StageRoles, pins_by_stage
from autopar.placements import Fold, State
from autopar.plan_types import Decisions
from autopar.pricing import price
from autopar.sharding import Pins, build_problem
from autopar.solver import InfeasibleProblem, Least, NothingCheaper, Search, Solution, evaluate
from autopar.trace import Trace

Progress = Callable[[str], None]
MemoryOf = Callable[[Decisions, tuple[int, ...], CostModel], MemoryEstimate]

DEFAULT_TIME_LIMIT_S = 60.0

_GAP = 1e-4
_LARGE, _LARGE_GAP = 3000, 1e-2  # distinct choices, and what is proven of problems with more
_LONG, _LONG_GAP = 10_000, 2e-2  # ops, and what is proven of large problems with more: layers alike by the hundred run
# again all together or not at all, and what that leaves open is not for an LP to prove
_MAX_LEANER = 24
_MOST_SIMULATED_OPS = 3000  # beyond, a program's memory is what the solver's model says (a second or more saved a mesh)


@dataclass(frozen=True)
class SearchSettings:
    """What the search is asked for.

    memory_of: simulated memory of the program that decisions give (the code generator knows).
    fixed_params: parameter states that must stay (a program that is already running).
    forbidden: decisions that must not be taken again (see `autopar.explaining`).
    faster_than_s: only plans with shorter steps are of interest; another kind of plan takes as long.
    stages: of a pipeline on meshes of different shape, what the axes are for in each.
    """

    cluster: ClusterSpec
    optimizer: OptimizerSpec
    memory_limit_bytes: int
    memory_of: MemoryOf
    pin: Mapping[str, Any] | None = None
    time_limit_s: float = DEFAULT_TIME_LIMIT_S
    fixed_params: Mapping[str, State] | None = None
    fixed_mesh: tuple[int, ...] | None = None
    forbidden: Forbidden | None = None
    progress: Progress | None = None
    faster_than_s: float = float("inf")
    stages: StageRoles | None = None

    @property
    def free(self) -> bool:
        """Whether the search may end in any layout, the usual ones among them."""
        conditions = (self.fixed_params, self.fixed_mesh, self.forbidden)
        return not self.pin and all(c is None for c in conditions) and self.cluster.devices > 1


class MeshSearch:
    """The search on one mesh.

    decisions: of the best plan so far, None if nothing fits; then `needed_bytes` would.
    bound_s: no plan on this mesh is faster, whatever the memory model says. gap: relative, what a search here
    proves. cut_off: the bound showed that there is no better plan than the one known; none was looked for.
    unexplained: nothing fits, and nobody asked so far what it would take.
    """

    def __init__(self, trace: Trace, mesh: tuple[int, ...], request: PinRequest, settings: SearchSettings) -> None:
        self.trace, self.mesh, self.settings = trace, mesh, settings
        self.costs = CostModel(settings.cluster, mesh)
        stages = settings.stages
        asked = resolve_pins(request, trace, mesh) if stages is None else pins_by_stage(request, trace, mesh, stages)
        pins = _with_fixed(asked, settings.fixed_params)
        pins = pins if settings.forbidden is None else settings.forbidden.added_to(pins)
        views = ViewMaps(mesh, _fold(trace, request, stages))
        self.stated = build_problem(trace, self.costs, settings.optimizer, pins=pins, views=views)
        self.capacity = settings.memory_limit_bytes
        self.decisions: Decisions | None = None
        self.memory: MemoryEstimate | None = None
        self.estimate: MemoryEstimate | None = None
        self.objective_s, self.status = float("inf"), "infeasible"
        self.bound_s: float | None = None
        self.needed_bytes: int | None = None
        self.needed_account: int | None = None  # the same by the solver's account, which is on the safe side
        self.needed_bound: int | None = None  # what it proved of that
        self.binding: str | None = None
        self.solver_peak = 0
        self.left = _MAX_LEANER
        distinct = sum(len(op.choices) for op in self.stated.problem.ops if op.twin_of is None)
        large = _LONG_GAP if len(self.stated.problem.ops) > _LONG else _LARGE_GAP
        self.gap = _GAP if distinct <= _LARGE else large
        self.cut_off, self.cutoff_s = False, float("inf")
        self.unexplained = False
        self.least: Least | None = None  # the solver's leanest plan, once it was asked for
        self.search, self.looked = self._search(), False

    def _search(self) -> Search:
        search = Search(replace(self.stated.problem, capacity_bytes=self.capacity), gap=self.gap)
        search.least = self.least
        return search

    def look(self, paid_s: Any, deadline: float, gap: float | None = None) -> None:
        """A first bound. paid_s: what memory is worth on another mesh, whose problem has the same ops. gap: how close
        this mesh's own prices have to be, where they are only wanted for others."""
        with contextlib.suppress(InfeasibleProblem):  # raised again when it is solved
            left_s = max(0.0, deadline - time.perf_counter())
            self.search.look(paid_s, time_limit_s=left_s, cutoff_s=self.settings.faster_than_s, gap=gap)
            self.looked = True

    def look_again(self, known: MeshSearch, deadline: float) -> None:
        """A better bound, at what memory is worth for the best plan that is known, if it may settle this mesh."""
        paid_s = known.search.paid_s
        open_to = known.objective_s * (1 - self.gap)
        if self.looked and paid_s is not None and self.search.turns is None and self.search.bound_s < open_to:
            left_s = max(0.0, deadline - time.perf_counter())
            self.search.look(paid_s, time_limit_s=left_s, cutoff_s=known.objective_s)

    def solve(self, deadline: float, known: MeshSearch | None = None, *, explained: bool = True) -> None:
        """The fastest plan within `capacity`, by the solver's memory model.

        known: only plans faster than this one's are of interest. explained: find out at once what it would take if
        nothing fits; else `explain` does when it is needed.
        """
        self.decisions = self.memory = None
        self.cutoff_s = self.settings.faster_than_s if known is None else known.objective_s
        left_s = max(0.0, deadline - time.perf_counter())
        try:
            if self.search.problem.capacity_bytes != self.capacity:
                self.least = self.search.least
                self.search, self.looked = self._search(), False
            if not self.looked:
                self.search.look(time_limit_s=left_s)
                self.looked = True
            result = self.search.finish(cutoff_s=self.cutoff_s, time_limit_s=left_s, explained=explained)
        except InfeasibleProblem as error:
            self.unexplained = not explained and error.least is None
            self.status = "infeasible"
            if error.least is not None:
                self._take_leanest(error.least)
            return
        except NothingCheaper as found:
            self.objective_s, self.status, self.cut_off = float("inf"), "cut off", True
            self._take_bound(found.bound_s)
            return
        self.cut_off = False
        self._take_bound(result.bound_s)
        self.objective_s, self.status = result.objective_s, result.status
        self.solver_peak = result.peak_bytes
        self.decisions = self.stated.decisions(result.solution)
        self.estimate = self._estimate(result.solution)

    def explain(self) -> None:
        """What it would take, after a `solve` that only showed that nothing fits: the leanest plan, at least."""
        self.unexplained = False
        with contextlib.suppress(InfeasibleProblem):  # there is none, however much memory there is
            least = self.search.explained().least
            assert least is not None
            self._take_leanest(least)

    def _take_bound(self, bound_s: float) -> None:
        """A bound holds for the limit it was proven for: those for leaner plans say nothing of the mesh."""
        if self.bound_s is None or self.capacity == self.settings.memory_limit_bytes:
            self.bound_s = max(bound_s, self.bound_s or 0.0)

    def beats(self, limit_s: float) -> bool:
        """Whether a plan here may be faster than that."""
        return self.bound_s is None or self.bound_s < limit_s * (1 - self.gap)

    def outcome(self) -> str:
        """One phrase for a person who waits."""
        if self.cut_off:
            return f"not faster (at least {(self.bound_s or 0.0) * 1e3:.3f} ms)"
        return "does not fit" if self.decisions is None else f"{self.objective_s * 1e3:.3f} ms"

    def fits(self) -> bool:
        """Whether the program of the present decisions, simulated, stays within the limit."""
        if self.memory is None and self.decisions is not None:
            self.memory = self.estimate or self.settings.memory_of(self.decisions, self.mesh, self.costs)
        return self.memory is not None and self.memory.peak_bytes <= self.settings.memory_limit_bytes

    def _estimate(self, solution: Solution) -> MemoryEstimate | None:
        """The solver's own figure, for programs too long to emit during the search; None for the others."""
        problem = self.stated.problem
        if len(problem.ops) <= _MOST_SIMULATED_OPS:
            return None
        found = evaluate(problem, solution)
        at = found.peak_time
        lines = {name: int(line[at]) for name, line in found.memory_by_category.items()}
        phase = "forward" if at < problem.forward_ops else "backward"
        return MemoryEstimate(found.peak_bytes, lines, phase, problem.ops[at].name)

    def lean(self, deadline: float) -> None:
        """The next plan that needs less memory; the leanest of all where there was none for long; or none."""
        self.left -= 1
        if self.left > 0 and time.perf_counter() < deadline:
            self.capacity = min(self.capacity, self.solver_peak) - 1
            self.solve(deadline)
        else:
            self._take_leanest(self.search.leanest())

    def _take_leanest(self, least: Least) -> None:
        """No other plan is left: the leanest by the solver's memory model may fit when simulated, else says what it
        takes. It is the same whatever the limit, and so is what it takes: with that as limit, there is a plan."""
        self._without_plan(least)
        decisions = self.stated.decisions(least.solution)
        memory = self._estimate(least.solution) or self.settings.memory_of(decisions, self.mesh, self.costs)
        if memory.peak_bytes <= self.settings.memory_limit_bytes:
            self.decisions, self.memory, self.status = decisions, memory, "leanest"
            self.objective_s = price(self.trace, decisions, self.costs, self.settings.optimizer).step_time_s
            self.bound_s = least.bound_s if self.bound_s is None else self.bound_s
        else:
            self.needed_bytes, self.binding = memory.peak_bytes, f"{memory.phase}: {memory.node}"

    def _without_plan(self, least: Least) -> None:
        self.decisions, self.status = None, "infeasible"
        self.needed_account, self.needed_bound = least.needed_bytes, least.bound_bytes
        if least.bound_bytes <= self.capacity:
            self._take_bound(least.bound_s)  # none was found, but there may be one: the gap has to count it


def _with_fixed(pins: Pins, fixed: Mapping[str, State] | None) -> Pins:
    if fixed is None:
        return pins
    return replace(pins, allow_param=lambda param, state: state == fixed[param.fqn])


def _fold(trace: Trace, request: PinRequest, stages: StageRoles | None) -> Fold | None:
    """How sequences of several samples are cut: dealt out on context axes only, where attention has parts of them."""
    roles = (request.roles,) if stages is None else stages.roles
    if any("cp" in one for one in roles):
        return fold_of(trace)
    by_tensor = request.sequence_parallel and any("tp" in one for one in roles)
    return trace.fold if by_tensor and trace.fold is not None and trace.fold.runs > 1 else None
