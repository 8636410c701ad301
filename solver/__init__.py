"""The exact solver: choices of ops, conversions, recomputation and memory, as one ILP. Knows no torch."""

from autopar.solver.evaluate import CATEGORIES, Evaluation, InvalidSolution, complete, evaluate
from autopar.solver.exhaustive import brute_force
from autopar.solver.problem import (
    Choice,
    InfeasibleProblem,
    Least,
    NothingCheaper,
    Op,
    Problem,
    Solution,
    SolveResult,
    Value,
)
from autopar.solver.search import Progress, Search
from autopar.solver.solve import minimum_capacity, solve

__all__ = [
    "CATEGORIES",
    "Choice",
    "Evaluation",
    "InfeasibleProblem",
    "InvalidSolution",
    "Least",
    "NothingCheaper",
    "Op",
    "Problem",
    "Progress",
    "Search",
    "Solution",
    "SolveResult",
    "Value",
    "brute_force",
    "complete",
    "evaluate",
    "minimum_capacity",
    "solve",
]
