"""One model of a problem, relaxed and then solved in integers.

`Stage.relax` solves the LP exactly: conversion groups come in as their gain demands, memory
rows as they are violated. `Stage.search` then finds integral solutions. It keeps only the
columns whose reduced cost does not exceed a *slack*: any solution cheaper than LP bound +
slack uses no other. So when the best solution found costs no more than that, it is
optimal among all; otherwise the slack grows to what the incumbent leaves open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from autopar.solver.clock import Clock
from autopar.solver.evaluate import Evaluation, complete, evaluate, fits_host
from autopar.solver.formulation import Formulation
from autopar.solver.lifetimes import Kinds, ValueLife
from autopar.solver.linear import Floats, LinearModel, LiveLp, LpResult
from autopar.solver.mip import MipResult, solve_mip
from autopar.solver.pricing import Prices, price
from autopar.solver.problem import Problem, Solution

COST_UNITS = 1e3  # the model's objective is about this large, so that HiGHS's absolute tolerances are relative ones
BYTE_UNITS = 1e4  # a memory limit in the model's unit
PENALTY = 1e4  # of a unit of memory beyond the limit, in an LP: a limit it cannot keep shows as excess in its solution
PRICED_OUT = 1e-7  # gains below this, in cost units, are rounding
FIRST_SLACK = 1e-3  # of the bound
SLACK_GROWTH = 8.0
MOST_ROWS = 24  # memory rows that come in at once
AIM = 0.9  # of a gap that is good enough: what bounds aim at, so that rounding does not leave them short
MOST_MIP_GAP = 1e-3  # of an integer program, where the gap of all that is proven may be more
MOST_LIKELY = 3  # integer programs that each add the memory rows that the solution of the last breaks
TAKEN = 1e-6  # of a choice, that is more than rounding
LAST_SLACK = 0.5  # of the bound: beyond it, all columns come in

Accept = Callable[[Solution, Evaluation], None]


class SolverError(RuntimeError):
    """The solver contradicts itself: a bug here, never the user's fault."""


@dataclass(frozen=True)
class Relaxation:
    """status: "optimal", "infeasible" or "time"; bound in model units; result of the last LP that was solved."""

    status: str
    bound: float
    result: LpResult | None
    excess: float = 0.0  # memory beyond the limit, in model units


class Stage:
    """A model with its LP.

    limit_bytes: None where memory is free. excess: minimise the bytes beyond the limit instead of the cost.
    """

    def __init__(
        self,
        problem: Problem,
        lives: tuple[ValueLife, ...],
        clock: Clock,
        cost_scale: float,
        *,
        limit_bytes: int | None,
        byte_reference: float = 1.0,
        excess: bool = False,
        kinds: Kinds | None = None,
    ) -> None:
        self.problem, self.lives, self.clock, self.excess = problem, lives, clock, excess
        self.limit_bytes, self.cost_scale = limit_bytes, cost_scale
        limit = 0.0 if limit_bytes is None else float(limit_bytes - problem.constant_bytes)
        self.model = LinearModel(len(problem.ops), BYTE_UNITS / max(byte_reference, 1.0), limit)
        self.form = Formulation(problem, lives, self.model, cost_scale, memory=limit_bytes is not None, kinds=kinds)
        self.live = LiveLp(self.model)
        self.stats = {"lp_solves": 0.0, "mips": 0.0, "mip_columns": 0.0}
        self._add_first_groups()

    def _add_first_groups(self) -> None:
        """For every source its cheapest targets, for every target its cheapest sources: enough to start with."""
        for v, rows in self.form.owners():
            wanted = sorted({int(p) for u in (*rows.own, *rows.later) for p in np.nonzero(u.wanted >= 0)[0]})
            cost = np.where(rows.own_there, np.inf, self.problem.values[v].convert_s)
            if not wanted:
                continue
            pairs = {(q, wanted[int(np.argmin(cost[q, wanted]))]) for q in rows.sources}
            pairs |= {(rows.sources[int(np.argmin(cost[rows.sources, p]))], p) for p in wanted}
            self.add_groups((v, q, p) for q, p in sorted(pairs))

    def add_groups(self, groups: Iterable[tuple[int, int, int]]) -> None:
        for v, q, p in groups:
            rows = self.form.values[v]
            if q not in rows.sources:
                continue
            if rows.own and not rows.own_there[q, p]:
                self.form.add_own(v, q, p)
            if rows.later and not rows.later_there[q, p]:
                self.form.add_later(v, q, p)

    def add_all_groups(self) -> None:
        for v, rows in self.form.owners():
            self.add_groups((v, q, p) for q in rows.sources for p in range(len(rows.own_there)))

    def groups(self) -> list[tuple[int, int, int]]:
        """All (value, from, to) that are in the model."""
        found: list[tuple[int, int, int]] = []
        for v, rows in self.form.owners():
            there = (rows.own_there | rows.later_there) & np.isfinite(self.problem.values[v].convert_s)
            np.fill_diagonal(there, False)
            found.extend((v, q, int(p)) for q in rows.sources for p in np.nonzero(there[q])[0])
        return found

    # -- the LP ------------------------------------------------------------------

    def costs(self) -> Floats:
        """[columns] the objective of this stage."""
        costs = np.zeros(len(self.model.cost)) if self.excess else np.asarray(self.model.cost)
        costs[self.model.excess] = 1.0 if self.excess else PENALTY
        return costs

    def relax(self, *, stop_at_zero: bool = False) -> Relaxation:
        """Solve the LP relaxation over all groups and all memory rows. stop_at_zero: an objective of 0 will do."""
        bound = -np.inf
        while True:
            self.live.set_costs(self.costs())
            result = self.live.solve(self.clock)
            self.stats["lp_solves"] += 1
            if result.status != "optimal":
                return Relaxation(result.status, bound, None)
            rows = self._violated(self.model.memory_line(result.values), result.values[self.model.excess])
            found = price(self.form, self.prices(result), PRICED_OUT)
            bound = max(bound, result.objective - found.total_gain)
            done = not rows and (stop_at_zero and result.objective <= PRICED_OUT)
            excess = float(result.values[self.model.excess])
            if done or (not rows and not found.own and not found.later):
                return Relaxation("optimal", bound, result, excess)
            if self.clock.out():
                return Relaxation("time", bound, result, excess)
            found.add_to(self.form)
            for at in rows:
                self.model.add_memory_row(at)

    def prices(self, result: LpResult) -> Prices:
        return Prices.of(self.form, result.duals, 0.0 if self.excess else self.cost_scale)

    def _violated(self, line: Floats, excess: float) -> list[int]:
        """Times whose memory goes beyond the limit (plus excess) and that are not rows yet: the highest peaks."""
        if self.limit_bytes is None or not len(line):
            return []
        limit = self.model.limit + excess / self.model.byte_scale
        over = line > limit + 1e-6 / self.model.byte_scale
        peaks = over & (line >= np.append(line[1:], -np.inf)) & (line > np.append(-np.inf, line[:-1]))
        fresh = [int(t) for t in np.nonzero(peaks)[0] if int(t) not in self.model.memory_rows]
        fresh = fresh or [int(t) for t in np.nonzero(over)[0] if int(t) not in self.model.memory_rows]
        return sorted(fresh, key=lambda t: (-line[t], t))[:MOST_ROWS]

    # -- integers ----------------------------------------------------------------

    def search(self, relaxed: Relaxation, accept: Accept, cutoff: float, gap: float) -> float:
        """Find solutions, hand each to `accept`, and return a bound in model units.

        cutoff: objective of the best solution known so far, in model units (inf if none).
        gap: relative, good enough.
        """
        assert relaxed.result is not None
        low, best, proven = relaxed.bound, cutoff, relaxed.bound
        slack = max(FIRST_SLACK * low, PRICED_OUT)
        while not self.clock.out():
            if best < np.inf:
                slack = min(slack, max(worthwhile(best, gap) - low, 0.0))
            if slack > LAST_SLACK * max(low, 1.0) and best == np.inf:
                slack = np.inf
            mip, found = self._restricted(relaxed.result, slack, accept, gap)
            best = min(best, found)
            proven = max(proven, min(mip.bound, low + slack))
            aim = worthwhile(best, gap)
            if slack == np.inf or (best < np.inf and (best - proven <= gap * best or low + slack >= aim)):
                break
            slack = aim - low if best < np.inf else slack * SLACK_GROWTH
        return min(proven, best)

    def search_likely(self, relaxed: Relaxation, accept: Accept, gap: float) -> None:
        """Solutions of the choices that the LP takes, be it in part, which are few. Each integer program ends at its
        root: how many there are of them, and what they find, does not depend on time."""
        assert relaxed.result is not None
        taken = np.zeros(len(self.model.cost), dtype=bool)
        taken[: len(relaxed.result.values)] = relaxed.result.values > TAKEN
        alive = np.ones(len(taken), dtype=bool)
        for columns in self.form.x:
            alive[columns] = taken[columns]
        for _ in range(MOST_LIKELY):
            self.stats["mips"] += 1
            mip = solve_mip(self.model, alive, self.costs(), gap=gap, time_limit_s=self.clock.left_s(), nodes=1)
            if mip.values is None or self._settle(mip, accept, gap):
                return

    def _restricted(self, lp: LpResult, slack: float, accept: Accept, gap: float) -> tuple[MipResult, float]:
        """The integer program on columns of reduced cost <= slack: its last run, and the best valid objective."""
        price(self.form, self.prices(lp), -slack if slack < np.inf else -np.inf).add_to(self.form)
        bound = -np.inf
        while True:
            alive = np.ones(len(self.model.cost), dtype=bool)
            alive[: len(lp.reduced)] = lp.reduced <= slack + 1e-6
            alive[self.model.excess] = self.excess
            self.stats["mips"] += 1
            self.stats["mip_columns"] = max(self.stats["mip_columns"], float(alive.sum()))
            mip_gap = min(gap, MOST_MIP_GAP)
            mip = solve_mip(self.model, alive, self.costs(), gap=mip_gap, time_limit_s=self.clock.left_s())
            bound = max(bound, mip.bound)
            mip = MipResult(mip.status, mip.values, mip.objective, bound)
            if mip.values is None:
                return mip, np.inf
            if self._settle(mip, accept, gap):
                return mip, mip.objective
            if self.clock.out():
                return mip, np.inf

    def _settle(self, mip: MipResult, accept: Accept, gap: float) -> bool:
        """Check an integral solution with `evaluate`; accept it, or add the memory rows that it violates."""
        assert mip.values is not None
        choices, recomputed, copies, away = self.form.decisions(mip.values)
        solution = complete(self.problem, choices, recomputed, copies, self.lives, away)
        found = evaluate(self.problem, solution, self.lives)
        if not fits_host(self.problem, found):
            self._forbid_on_host(mip.values)
            return False
        if self.limit_bytes is not None:
            limit = self.model.limit + (mip.values[self.model.excess] / self.model.byte_scale if self.excess else 0.0)
            line = found.memory_bytes.astype(np.float64) - self.problem.constant_bytes
            rows = [int(t) for t in np.nonzero(line > limit + 1e-6 / self.model.byte_scale)[0]]
            fresh = [t for t in rows if t not in self.model.memory_rows]
            if fresh:
                if self.excess:  # a solution all the same, if not as lean as the model thought
                    accept(solution, found)
                for at in self._violated(line, mip.values[self.model.excess]) or fresh:
                    self.model.add_memory_row(at)
                return False
            over = np.nonzero(line > limit)[0] if not self.excess else np.zeros(0)
            if len(over):
                self._forbid(mip.values, int(over[0]))
                return False
        self._agree(mip, found, gap)
        accept(solution, found)
        return True

    def _forbid(self, values: Floats, at: int) -> None:
        """A cover cut: HiGHS let memory at `at` pass by its tolerance, but these columns cannot all be 1."""
        columns, first, last, nbytes = (np.asarray(a) for a in self.model.memory)
        alive = (first <= at) & (at <= last) & (values[columns.astype(np.int64)] > 0.5)
        cover = sorted(set(columns[alive].astype(int).tolist()) - {self.model.excess})
        if nbytes[alive].sum() <= self.model.limit:
            raise SolverError(f"memory at time {at} is over the limit, but not in the model: report this problem")
        self.model.add_row(-np.inf, len(cover) - 1.0, [(c, 1.0) for c in cover])

    def _forbid_on_host(self, values: Floats) -> None:
        """The same for the host's memory."""
        there = {column for row, column, _ in zip(*self.model.entries, strict=True) if row == self.form.host_row}
        on_host = sorted(column for column in there if values[column] > 0.5)
        if not on_host:
            raise SolverError("the host's memory is over its limit, but not in the model: report this problem")
        self.model.add_row(-np.inf, len(on_host) - 1.0, [(c, 1.0) for c in on_host])

    def _agree(self, mip: MipResult, found: Evaluation, gap: float) -> None:
        """The model's objective and the price from scratch must agree."""
        if self.excess:
            return
        priced = found.cost_s * self.cost_scale
        rounding = 1e-6 * max(1.0, abs(priced))
        least = min(mip.bound, mip.objective * (1 - gap))  # out of time, even that may be far below
        if priced > mip.objective + rounding or priced < least - rounding:
            raise SolverError(
                f"the model says {mip.objective / self.cost_scale:.9g} s, but the solution costs {found.cost_s:.9g} s "
                "priced from scratch: report this problem"
            )


def worthwhile(cost: float, gap: float) -> float:
    """What a solution must cost less than for a known one not to be good enough: others need not be looked at."""
    return cost * (1 - AIM * gap)


def bytes_bound(stage: Stage, bound: float) -> int:
    """A bound of a stage that minimises excess over a limit of 0, in whole bytes (constant bytes included)."""
    return max(0, math.ceil(bound / stage.model.byte_scale * (1 - 1e-9) - 1e-3)) + stage.problem.constant_bytes
