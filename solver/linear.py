"""A linear model that only grows, and its LP in HiGHS's memory.

Columns are nonnegative with no upper bound of their own: bounds that matter are rows, so
that row duals alone price any column. Besides its coefficients a column may hold memory
over spans of time; memory rows, one per time, are added when they turn out to bind.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import highspy
import numpy as np
import numpy.typing as npt

from autopar.solver.clock import Clock

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DUAL, PRIMAL = 1, 4  # HiGHS's simplex_strategy

LP_OPTIONS: dict[str, object] = {
    "output_flag": False,
    "threads": 1,
    "random_seed": 7,
    "solver": "simplex",
    "small_matrix_value": 1e-12,
}


class LinearModel:
    """Minimise cost @ x subject to row_low <= A x <= row_high, x >= 0, and memory rows.

    times: number of points in time. byte_scale: factor from bytes to the unit of memory
    rows, which keeps their numbers near 1. limit: right-hand side of memory rows, in bytes,
    with constant bytes already taken off; memory beyond it is paid in the column `excess`.
    """

    def __init__(self, times: int, byte_scale: float, limit: float) -> None:
        self.times, self.byte_scale, self.limit = times, byte_scale, limit
        self.cost: list[float] = []
        self.integer: list[bool] = []
        self.row_low: list[float] = []
        self.row_high: list[float] = []
        self.entries: tuple[list[int], list[int], list[float]] = ([], [], [])
        self.memory: tuple[list[int], list[int], list[int], list[float]] = ([], [], [], [])
        self.memory_rows: dict[int, int] = {}  # time -> row
        self._memory_done = 0
        self._held: tuple[Ints, Ints, Ints, Floats] | None = None
        self.excess = self.add_column(0.0)

    # -- growing -----------------------------------------------------------------

    def add_column(self, cost: float, rows: Iterable[tuple[int, float]] = (), integer: bool = False) -> int:
        column = len(self.cost)
        self.cost.append(cost)
        self.integer.append(integer)
        for row, value in rows:
            self.add_entry(row, column, value)
        return column

    def add_row(self, low: float, high: float, columns: Iterable[tuple[int, float]] = ()) -> int:
        row = len(self.row_low)
        self.row_low.append(low)
        self.row_high.append(high)
        for column, value in columns:
            self.add_entry(row, column, value)
        return row

    def add_entry(self, row: int, column: int, value: float) -> None:
        self.entries[0].append(row)
        self.entries[1].append(column)
        self.entries[2].append(value)

    def hold(self, column: int, span: tuple[int, int] | None, nbytes: float) -> None:
        """One unit of `column` holds `nbytes` over `span`. For a column that no LP has seen yet."""
        if span is not None and nbytes:
            columns, first, last, held = self.memory
            columns.append(column)
            first.append(span[0])
            last.append(span[1])
            held.append(nbytes)

    def hold_all(self, held: tuple[list[int], list[float]], span: tuple[int, int] | None) -> None:
        """`hold` of many: columns, and the bytes of each (not 0)."""
        if span is not None and held[0]:
            columns, first, last, nbytes = self.memory
            columns.extend(held[0])
            first.extend([span[0]] * len(held[0]))
            last.extend([span[1]] * len(held[0]))
            nbytes.extend(held[1])

    def _holds(self) -> tuple[Ints, Ints, Ints, Floats]:
        """Column, first and last time, and bytes of everything that is held, as arrays."""
        if self._held is None or len(self._held[0]) != len(self.memory[0]):
            columns, first, last = (np.asarray(a, dtype=np.int64) for a in self.memory[:3])
            self._held = (columns, first, last, np.asarray(self.memory[3], dtype=np.float64))
        return self._held

    def settle_memory(self) -> None:
        """Enter columns that came since the last call into the memory rows that are there."""
        if self._memory_done == len(self.memory[0]):
            return
        columns, first, last, nbytes = self._holds()
        new = slice(self._memory_done, None)
        for time, row in self.memory_rows.items():
            self._enter_memory(time, row, (columns[new], first[new], last[new], nbytes[new]))
        self._memory_done = len(self.memory[0])

    def add_memory_row(self, time: int) -> None:
        """Demand that memory at `time`, less `excess`, stays within the limit."""
        self.settle_memory()
        row = self.add_row(-np.inf, self.limit * self.byte_scale, [(self.excess, -1.0)])
        self._enter_memory(time, row, self._holds())
        self.memory_rows[time] = row

    def _enter_memory(self, time: int, row: int, holds: tuple[Ints, Ints, Ints, Floats]) -> None:
        """What is held at `time`, one entry per column: identical layers share theirs."""
        columns, first, last, nbytes = holds
        alive = (first <= time) & (time <= last)
        held = np.bincount(columns[alive], nbytes[alive] * self.byte_scale)
        there = np.nonzero(held)[0]
        self.entries[0].extend([row] * len(there))
        self.entries[1].extend(there.tolist())
        self.entries[2].extend(held[there].tolist())

    def memory_line(self, values: Floats) -> Floats:
        """[times] bytes held by a (fractional) solution, constant bytes not included."""
        columns, first, last, nbytes = self._holds()
        if not len(columns):
            return np.zeros(self.times)
        held = values[columns] * nbytes
        steps = np.bincount(first, held, self.times + 1) - np.bincount(last + 1, held, self.times + 1)
        return np.cumsum(steps)[: self.times]


@dataclass(frozen=True)
class LpResult:
    """status: "optimal", "infeasible" or "time". duals are per row: reduced cost = cost - duals @ column."""

    status: str
    objective: float
    values: Floats
    duals: Floats
    reduced: Floats


class LiveLp:
    """The LP of a growing model, solved again and again from the last basis."""

    def __init__(self, model: LinearModel) -> None:
        self.model = model
        self.highs = quiet_highs()
        for name, option in LP_OPTIONS.items():
            self.highs.setOptionValue(name, option)
        self._columns = self._rows = self._entries = self._solved_rows = 0
        self._solved = False

    def set_costs(self, costs: Floats) -> None:
        """Replace the cost of all columns (only inside the LP; the model keeps its own)."""
        self.sync()
        n = len(self.model.cost)
        self.highs.changeColsCost(n, np.arange(n, dtype=np.int32), costs)

    def sync(self) -> None:
        """Hand new columns and rows to HiGHS."""
        model = self.model
        model.settle_memory()
        rows, columns = (np.asarray(a[self._entries :], dtype=np.int64) for a in model.entries[:2])
        values = np.asarray(model.entries[2][self._entries :], dtype=np.float64)
        n, m = len(model.cost), len(model.row_low)
        if n > self._columns:
            pick = rows < self._rows
            start, index, value = compress(columns[pick] - self._columns, rows[pick], values[pick], n - self._columns)
            cost = np.asarray(model.cost[self._columns :], dtype=np.float64)
            low, high = np.zeros(len(cost)), np.full(len(cost), np.inf)
            self.highs.addCols(len(cost), cost, low, high, len(index), start, index, value)
        if m > self._rows:
            pick = rows >= self._rows
            start, index, value = compress(rows[pick] - self._rows, columns[pick], values[pick], m - self._rows)
            low = np.asarray(model.row_low[self._rows :], dtype=np.float64)
            high = np.asarray(model.row_high[self._rows :], dtype=np.float64)
            self.highs.addRows(len(low), low, high, len(index), start, index, value)
        self._columns, self._rows, self._entries = n, m, len(model.entries[0])

    def solve(self, clock: Clock) -> LpResult:
        """Solve from the last basis. New rows leave it dual feasible, new columns and costs primal feasible."""
        primal = self._solved and len(self.model.row_low) == self._solved_rows
        self.highs.setOptionValue("simplex_strategy", PRIMAL if primal else DUAL)
        self.sync()
        self._solved, self._solved_rows = True, self._rows
        self._set_limits(clock)
        kinds = highspy.HighsModelStatus
        self._run(clock)
        for strategy in (DUAL, PRIMAL):
            if self.highs.getModelStatus() != kinds.kUnknown:
                break
            self.highs.clearSolver()  # it lost its way from the last basis: from scratch, then
            self.highs.setOptionValue("simplex_strategy", strategy)
            self._run(clock)
        status = self.highs.getModelStatus()
        solution = self.highs.getSolution()
        values, duals, reduced = (
            np.asarray(a, dtype=np.float64) for a in (solution.col_value, solution.row_dual, solution.col_dual)
        )
        if status == kinds.kOptimal:
            return LpResult("optimal", self.highs.getObjectiveValue(), values, duals, reduced)
        if status in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible):
            return LpResult("infeasible", np.inf, values, duals, reduced)
        if status in (kinds.kTimeLimit, kinds.kIterationLimit):
            return LpResult("time", np.inf, values, duals, reduced)
        raise RuntimeError(f"HiGHS stopped an LP with {self.highs.modelStatusToString(status)}: report this problem")

    def _set_limits(self, clock: Clock) -> None:
        left_s, iterations = clock.left_s(), clock.iterations_left(self._rows + self._columns)
        limit_s = np.inf if left_s is None else max(left_s, 0.01) + self.highs.getRunTime()
        self.highs.setOptionValue("time_limit", limit_s)
        self.highs.setOptionValue("simplex_iteration_limit", highspy.kHighsIInf if iterations is None else iterations)

    def _run(self, clock: Clock) -> None:
        self.highs.run()
        clock.spend(self.highs.getInfo().simplex_iteration_count, self._rows + self._columns)


def quiet_highs() -> highspy.Highs:
    """A HiGHS instance. The first of a process prints a banner, whatever its options: not onto the user's stdout."""
    sys.stdout.flush()
    try:
        stdout = os.dup(1)
    except OSError:  # no stdout: nothing to keep clean
        return highspy.Highs()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            highs = highspy.Highs()
            ctypes.CDLL(None).fflush(None)  # C holds the banner back until its buffer is written
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
    return highs


def compress(
    major: Ints, minor: Ints, values: Floats, majors: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Floats]:
    """COO to compressed form (starts, minor indices, values); duplicates are summed, zeros dropped."""
    if len(major):
        width = int(minor.max()) + 1
        keys, inverse = np.unique(major * width + minor, return_inverse=True)
        summed = np.bincount(inverse, values, len(keys))
        keep = summed != 0.0
        keys, values = keys[keep], summed[keep]
        major, minor = keys // width, keys % width
    starts = np.searchsorted(major, np.arange(majors)).astype(np.int32)
    return starts, minor.astype(np.int32), values.astype(np.float64)
