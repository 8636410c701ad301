"""The integer program, stated in PuLP and solved by HiGHS; status and bound are read from HiGHS itself.

A program of very many entries goes to HiGHS as arrays: stating it in PuLP would take longer than solving it.

PuLP calls a run that stopped at its time limit "Optimal", so its word is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
import numpy.typing as npt
import pulp

from autopar.solver.linear import Floats, LinearModel, compress, quiet_highs

Limits = dict[str, int]  # HiGHS's options

MOST_ENTRIES = 200_000  # that PuLP is asked to state, about a second


@dataclass(frozen=True)
class MipResult:
    """values: [columns of the model] or None if nothing was found. bound: proven for this (restricted) model."""

    status: str  # "optimal", "infeasible" or "time" (or nodes)
    values: Floats | None
    objective: float
    bound: float


def solve_mip(
    model: LinearModel,
    alive: npt.NDArray[np.bool_],
    costs: Floats,
    *,
    gap: float,
    time_limit_s: float | None,
    nodes: int | None = None,
) -> MipResult:
    """Solve `model` with all columns that are not `alive` fixed to 0. `costs`: [columns] the objective.

    nodes: of the search tree, if it is to end after so many.
    """
    limits: Limits = {} if nodes is None else {"mip_max_nodes": nodes}
    if len(model.entries[0]) > MOST_ENTRIES:
        return _solve_arrays(model, alive, costs, gap, time_limit_s, limits)
    lp = pulp.LpProblem("autopar", pulp.LpMinimize)
    columns = np.nonzero(alive)[0]
    variables = {int(j): _variable(lp, int(j), model.integer[j]) for j in columns}
    lp.setObjective(pulp.LpAffineExpression([(v, float(costs[j])) for j, v in variables.items() if costs[j]]))
    if not _add_rows(lp, model, alive, variables):
        return MipResult("infeasible", None, np.inf, np.inf)
    solver = _Solver(gap, time_limit_s, limits)
    solver.solve(lp)
    stated = np.array([int(v.name[1:]) for v in lp.variables()], dtype=np.int64)  # those with any cost or row
    return _read(lp.solverModel, stated, len(model.cost))


def _solve_arrays(
    model: LinearModel,
    alive: npt.NDArray[np.bool_],
    costs: Floats,
    gap: float,
    time_limit_s: float | None,
    limits: Limits,
) -> MipResult:
    model.settle_memory()
    columns = np.nonzero(alive)[0]
    place = np.full(len(alive), -1, dtype=np.int64)
    place[columns] = np.arange(len(columns))
    rows, places = np.asarray(model.entries[0], dtype=np.int64), place[np.asarray(model.entries[1], dtype=np.int64)]
    kept = places >= 0
    values = np.asarray(model.entries[2], dtype=np.float64)[kept]
    starts, index, value = compress(places[kept], rows[kept], values, len(columns))
    integer = np.asarray(model.integer, dtype=bool)[columns]
    highs = quiet_highs()
    limit = np.inf if time_limit_s is None else max(time_limit_s, 0.01)
    options = {"output_flag": False, "mip_rel_gap": gap, "mip_abs_gap": 0.0, "threads": 1, "random_seed": 7}
    for name, option in {**options, **limits, "time_limit": limit, "small_matrix_value": 1e-12}.items():
        highs.setOptionValue(name, option)
    nothing = np.zeros(0, dtype=np.int32)
    low, high = np.asarray(model.row_low, dtype=np.float64), np.asarray(model.row_high, dtype=np.float64)
    highs.addRows(len(low), low, high, 0, np.zeros(len(low), dtype=np.int32), nothing, np.zeros(0))
    upper = np.where(integer, 1.0, np.inf)
    highs.addCols(len(columns), costs[columns], np.zeros(len(columns)), upper, len(index), starts, index, value)
    kinds = np.array([highspy.HighsVarType.kInteger if i else highspy.HighsVarType.kContinuous for i in integer])
    highs.changeColsIntegrality(len(columns), np.arange(len(columns), dtype=np.int32), kinds)
    highs.run()
    return _read(highs, columns, len(model.cost))


def _variable(lp: pulp.LpProblem, column: int, integer: bool) -> pulp.LpVariable:
    # PuLP orders variables by name: padded, the order of the model's columns stays
    return lp.add_variable(f"c{column:09d}", 0, 1 if integer else None, cat="Integer" if integer else "Continuous")


def _add_rows(
    lp: pulp.LpProblem, model: LinearModel, alive: npt.NDArray[np.bool_], variables: dict[int, pulp.LpVariable]
) -> bool:
    """State all rows; False if a row without columns is violated."""
    model.settle_memory()
    terms: list[dict[pulp.LpVariable, float]] = [{} for _ in model.row_low]
    for row, column, value in zip(*model.entries, strict=True):
        if alive[column]:
            variable = variables[column]
            terms[row][variable] = terms[row].get(variable, 0.0) + value
    for row, (low, high) in enumerate(zip(model.row_low, model.row_high, strict=True)):
        if not terms[row]:
            if low > 0 or high < 0:
                return False
            continue
        sum_of = pulp.LpAffineExpression(terms[row])
        if low == high:
            lp.addConstraint(pulp.LpConstraint(sum_of, pulp.LpConstraintEQ, f"r{row}", high))
            continue
        if np.isfinite(high):
            lp.addConstraint(pulp.LpConstraint(sum_of, pulp.LpConstraintLE, f"r{row}", high))
        if np.isfinite(low):
            lp.addConstraint(pulp.LpConstraint(sum_of, pulp.LpConstraintGE, f"g{row}", low))
    return True


class _Solver(pulp.HiGHS):
    """pulp.HiGHS with settings that make a run repeatable."""

    def __init__(self, gap: float, time_limit_s: float | None, limits: Limits) -> None:
        limit = None if time_limit_s is None else max(time_limit_s, 0.01)
        super().__init__(msg=False, gapRel=gap, gapAbs=0.0, threads=1, timeLimit=limit, random_seed=7)
        self.limits = limits

    def callSolver(self, lp: pulp.LpProblem) -> None:
        for name, option in {**self.limits, "small_matrix_value": 1e-12}.items():
            lp.solverModel.setOptionValue(name, option)
        lp.solverModel.run()

    def findSolutionValues(self, lp: pulp.LpProblem) -> tuple[int, int]:
        """Not asked: `_read` does, and PuLP knows no limit of nodes."""
        return pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound


def _read(highs: highspy.Highs, columns: npt.NDArray[np.int64], size: int) -> MipResult:
    kinds = highspy.HighsModelStatus
    status, info = highs.getModelStatus(), highs.getInfo()
    if status in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible):
        return MipResult("infeasible", None, np.inf, np.inf)
    if status not in (kinds.kOptimal, kinds.kTimeLimit, kinds.kSolutionLimit, kinds.kObjectiveBound, kinds.kModelEmpty):
        raise RuntimeError(f"HiGHS stopped an integer program with {highs.modelStatusToString(status)}: report this")
    name = "time" if status in (kinds.kTimeLimit, kinds.kSolutionLimit) else "optimal"
    bound = info.mip_dual_bound if highs.getLp().integrality_ else info.objective_function_value
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return MipResult(name, None, np.inf, bound)
    values = np.zeros(size)
    values[columns] = np.asarray(highs.getSolution().col_value)
    return MipResult(name, values, info.objective_function_value, bound)
