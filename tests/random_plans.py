"""Random legal decisions: whatever the problem allows, not what is good."""

from __future__ import annotations

import random

import numpy as np

from autopar.dataflow import is_backward
from autopar.plan_types import Decisions
from autopar.sharding import ShardingProblem
from autopar.solver import Solution
from autopar.trace import Trace


def random_decisions(trace: Trace, stated: ShardingProblem, rng: random.Random) -> Decisions:
    """A random choice for every op; every value that the backward pass may need is kept."""
    ops, values = stated.problem.ops, stated.problem.values
    made: dict[int, int] = {}
    choices: list[int] = []
    for op in ops:
        reachable = [
            i
            for i, choice in enumerate(op.choices)
            if all(np.isfinite(values[v].convert_s[made[v], s]) for v, s in zip(op.operands, choice.uses, strict=True))
        ]
        choices.append(choices[op.tied_to] if op.tied_to is not None else rng.choice(reachable))
        made.update(zip(op.results, op.choices[choices[-1]].makes, strict=True))
    solution = Solution(tuple(choices), frozenset(), frozenset(), frozenset())
    decisions = stated.decisions(solution)
    forward = {n.name for n in trace.graph_module.graph.nodes if n.op == "call_function" and not is_backward(n)}
    kept = frozenset(v for v in stated.value_index if v.split("#")[0] in forward)
    return Decisions(decisions.nodes, decisions.params, decisions.outputs, kept, frozenset())
