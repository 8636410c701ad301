"""`solve`: the cheapest solution that fits, with proof; `minimum_capacity`: the least memory that any needs.

First with memory free: that model is far smaller, and if its optimum fits it is the answer
(its bound holds in any case). Then with memory limited, starting from what was learnt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.solver.check import check_problem
from autopar.solver.evaluate import Evaluation, InvalidSolution, complete, evaluate
from autopar.solver.lifetimes import lifetimes
from autopar.solver.problem import InfeasibleProblem, Problem, Solution, SolveResult
from autopar.solver.stage import COST_UNITS, Clock, Relaxation, SolverError, Stage, bytes_bound

NO_ASSIGNMENT = "no assignment of choices has all its conversions possible: give some op another choice"


@dataclass(frozen=True)
class Progress:
    """What `solve` knows at a moment. incumbent_s is None before the first solution."""

    stage: str
    elapsed_s: float
    incumbent_s: float | None
    bound_s: float


def solve(
    problem: Problem,
    *,
    time_limit_s: float | None = None,
    gap: float = 1e-4,
    progress: Callable[[Progress], None] | None = None,
) -> SolveResult:
    """The cheapest solution within the capacity, to a relative `gap`.

    With a time limit the best solution found by then is returned, with the bound that was
    proven; finding a first one may take longer than the limit. Raises InfeasibleProblem.
    """
    check_problem(problem)
    return _Search(problem, Clock(time_limit_s), gap, progress).run()


def minimum_capacity(problem: Problem, time_limit_s: float | None = None) -> tuple[int, int, Solution]:
    """(needed_bytes, bound_bytes, solution): the least peak found, a proven lower bound, who attains it."""
    check_problem(problem)
    search = _Search(problem, Clock(time_limit_s), 0.0, None)
    search.solve_free(needed=False)
    return search.least_memory(search.clock)


class _Search:
    def __init__(
        self, problem: Problem, clock: Clock, gap: float, progress: Callable[[Progress], None] | None
    ) -> None:
        self.problem, self.clock, self.gap, self.progress = problem, clock, gap, progress
        self.lives = lifetimes(problem)
        cheapest = sum(min(c.cost_s for c in op.choices) for op in problem.ops)
        dearest = sum(max(c.cost_s for c in op.choices) for op in problem.ops)
        conversions = [v.convert_s[np.isfinite(v.convert_s)].mean() for v in problem.values if len(v.state_bytes)]
        self.cost_scale = COST_UNITS / (cheapest or dearest or sum(conversions) or 1.0)
        self.bound_s = cheapest
        self.best: tuple[Solution, Evaluation] | None = None
        self.free_peak = 1
        self.free_groups: list[tuple[int, int, int]] = []
        self.stats: dict[str, float] = {}

    # -- the whole ---------------------------------------------------------------

    def run(self) -> SolveResult:
        self.solve_free(needed=True)
        if not self._closed() and self.problem.capacity_bytes is not None:
            self._solve_limited()
        return self._result()

    def solve_free(self, *, needed: bool) -> None:
        """With memory free. Only its LP, rounded, if the solution itself is not `needed`."""
        stage = Stage(self.problem, self.lives, Clock(None), self.cost_scale, limit_bytes=None)
        relaxed = self._relax_always_feasible(stage)
        stage.clock = self.clock
        assert relaxed.result is not None
        self._raise_bound(relaxed.bound / self.cost_scale)
        self._offer_rounded(stage, relaxed.result.values)
        self._report("memory free, relaxed")
        if needed and not self._closed():
            cutoff = self._cutoff()
            bound = stage.search(relaxed, self._accept, cutoff, self.gap * 0.5)
            self._raise_bound(bound / self.cost_scale)
            self._report("memory free")
        self._note("free", stage)
        self.free_groups = [
            (v, q, int(p))
            for v, rows in enumerate(stage.form.values)
            for q in rows.sources
            for p in np.nonzero((rows.own_there | rows.later_there)[q])[0]
            if q != p and np.isfinite(self.problem.values[v].convert_s[q, p])
        ]

    def _relax_always_feasible(self, stage: Stage) -> Relaxation:
        """Relax a stage whose LP can only be infeasible for want of conversions."""
        relaxed = stage.relax()
        if relaxed.status == "infeasible":
            stage.add_all_groups()
            relaxed = stage.relax()
        if relaxed.status == "infeasible":
            raise InfeasibleProblem(NO_ASSIGNMENT)
        return relaxed

    def _solve_limited(self) -> None:
        limit = self.problem.capacity_bytes
        assert limit is not None
        stage = self._limited_stage(limit, self._byte_reference(limit), excess=False)
        relaxed = stage.relax()
        if relaxed.status == "infeasible":
            self._make_feasible(stage)
            relaxed = stage.relax()
            if relaxed.status == "infeasible":
                raise SolverError("an LP with a feasible point was found infeasible: report this problem")
        self._raise_bound(relaxed.bound / self.cost_scale)
        self._report("memory limited, relaxed")
        if relaxed.result is not None:
            self._offer_rounded(stage, relaxed.result.values)
            if relaxed.status == "optimal" and not self._closed():
                bound = stage.search(relaxed, self._accept, self._cutoff(), self.gap)
                self._raise_bound(bound / self.cost_scale)
        self._note("limited", stage)
        if self.best is None:
            self._find_any(limit)

    def _byte_reference(self, limit: int) -> float:
        """Bytes that count as one unit: the limit, unless it is so small that the numbers of memory rows explode."""
        return max(float(limit), self.free_peak / 16)

    def _limited_stage(self, limit: int, reference: float, *, excess: bool) -> Stage:
        stage = Stage(
            self.problem,
            self.lives,
            self.clock,
            self.cost_scale,
            limit_bytes=limit,
            byte_reference=reference,
            excess=excess,
        )
        stage.add_groups(self.free_groups)
        return stage

    def _make_feasible(self, stage: Stage) -> None:
        """Bring in the groups that a fractional solution within the limit needs; raise if there is none."""
        clock, stage.clock, stage.excess = stage.clock, Clock(None), True
        relaxed = stage.relax(stop_at_zero=True)
        if relaxed.status == "infeasible":
            stage.add_all_groups()
            relaxed = stage.relax(stop_at_zero=True)
        stage.clock, stage.excess = clock, False
        if relaxed.status == "infeasible" or relaxed.bound > 1e-6:
            self._raise_infeasible()

    def _find_any(self, limit: int) -> None:
        """No solution so far: minimise the excess over the limit, whatever time it takes; raise if it is not 0."""
        stage = self._limited_stage(limit, self._byte_reference(limit), excess=True)
        stage.clock = Clock(None)
        relaxed = self._relax_always_feasible(stage)
        if relaxed.bound <= 1e-6:
            stage.search(relaxed, self._accept, np.inf, 0.0)
        if self.best is None:
            self._raise_infeasible()

    # -- least memory ------------------------------------------------------------

    def least_memory(self, clock: Clock) -> tuple[int, int, Solution]:
        """See `minimum_capacity`."""
        found: list[tuple[int, Solution]] = []
        stage = self._limited_stage(0, float(self.free_peak), excess=True)
        relaxed = self._relax_always_feasible(stage)
        if relaxed.result is not None and relaxed.status == "optimal":
            bound = stage.search(relaxed, lambda s, e: found.append((e.peak_bytes, s)), np.inf, 0.0)
        if not found:
            stage.clock = Clock(None)
            relaxed = self._relax_always_feasible(stage)
            bound = stage.search(relaxed, lambda s, e: found.append((e.peak_bytes, s)), np.inf, 0.05)
        needed, solution = min(found, key=lambda item: item[0])
        return needed, min(needed, bytes_bound(stage, bound)), solution

    def _raise_infeasible(self) -> None:
        left = self.clock.left_s()
        needed, bound, solution = self.least_memory(Clock(None if left is None else max(left, 1.0)))
        at = evaluate(self.problem, solution, self.lives).peak_time
        raise InfeasibleProblem(
            f"no solution fits in {self.problem.capacity_bytes} bytes: the smallest needs {needed} bytes "
            f"(at op {self.problem.ops[at].name!r}); raise the capacity to that",
            needed,
            bound,
            at,
        )

    # -- incumbent and bound -----------------------------------------------------

    def _accept(self, solution: Solution, found: Evaluation) -> None:
        self.free_peak = max(self.free_peak, found.peak_bytes)
        limit = self.problem.capacity_bytes
        if limit is not None and found.peak_bytes > limit:
            return
        if self.best is None or found.cost_s < self.best[1].cost_s:
            self.best = (solution, found)

    def _offer_rounded(self, stage: Stage, values: np.ndarray) -> None:
        """The likeliest choices of a relaxation, with everything kept, as the LP says, or all run again."""
        choices, recomputed, copies = stage.form.decisions(values)
        everything = [o for o, op in enumerate(self.problem.ops) if op.recompute_time is not None]
        for again in ([], recomputed, everything):
            try:
                solution = complete(self.problem, choices, again, copies, self.lives)
                self._accept(solution, evaluate(self.problem, solution, self.lives))
            except InvalidSolution:  # rounding asked for an impossible conversion
                continue

    def _cutoff(self) -> float:
        return np.inf if self.best is None else self.best[1].cost_s * self.cost_scale

    def _raise_bound(self, bound_s: float) -> None:
        self.bound_s = max(self.bound_s, bound_s)

    def _closed(self) -> bool:
        return self.best is not None and self._gap(self.best[1].cost_s) <= self.gap

    def _gap(self, cost_s: float) -> float:
        gap = max(0.0, cost_s - self.bound_s) / cost_s if cost_s > 0 else 0.0
        return gap if gap > 1e-9 else 0.0  # what is left below is rounding

    def _report(self, stage: str) -> None:
        if self.progress is not None:
            best = None if self.best is None else self.best[1].cost_s
            self.progress(Progress(stage, self.clock.elapsed_s(), best, self.bound_s))

    def _note(self, name: str, stage: Stage) -> None:
        self.stats |= {f"{name}_{key}": value for key, value in stage.stats.items()}
        self.stats[f"{name}_columns"] = float(len(stage.model.cost))
        self.stats[f"{name}_rows"] = float(len(stage.model.row_low))

    def _result(self) -> SolveResult:
        assert self.best is not None
        solution, found = self.best
        again = evaluate(self.problem, solution, self.lives)
        limit = self.problem.capacity_bytes
        if again.cost_s != found.cost_s or (limit is not None and again.peak_bytes > limit):
            raise SolverError("the solution does not fit or not cost what was found: report this problem")
        bound = min(self.bound_s, found.cost_s)
        gap = self._gap(found.cost_s)
        status = "optimal" if gap <= self.gap else "feasible"
        seconds = self.clock.elapsed_s()
        return SolveResult(
            solution, status, found.cost_s, bound, gap, found.peak_bytes, found.peak_time, seconds, self.stats
        )
