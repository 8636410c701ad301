"""The exact solver: choices of ops, conversions, recomputation and memory, as one ILP. Knows no torch."""

from autopar.solver.evaluate import CATEGORIES, Evaluation, InvalidSolution, complete, evaluate
from autopar.solver.exhaustive import brute_force
from autopar.solver.problem import Choice, InfeasibleProblem, Op, Problem, Solution, SolveResult, Value

__all__ = [
    "CATEGORIES",
    "Choice",
    "Evaluation",
    "InfeasibleProblem",
    "InvalidSolution",
    "Op",
    "Problem",
    "Solution",
    "SolveResult",
    "Value",
    "brute_force",
    "complete",
    "evaluate",
]
