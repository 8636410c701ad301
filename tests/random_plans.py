"""Random legal decisions: whatever the problem allows, not what is good."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from autopar.dataflow import is_backward
from autopar.plan_types import Decisions
from autopar.sharding import ShardingProblem
from autopar.solver import Solution
from autopar.trace import Trace

# Chances that an op runs again and that a copy is kept: nothing, some of both, all, most.
RECOMPUTE_AND_COPIES = ((0.0, 0.0), (0.3, 0.5), (1.0, 0.0), (0.7, 1.0))


def random_decisions(
    trace: Trace,
    stated: ShardingProblem,
    rng: random.Random,
    *,
    recompute: float = 0.0,
    keep_copies: float = 0.0,
    offload: float = 0.0,
) -> Decisions:
    """A random choice for every op.

    recompute: chance that an op which may run again does; the results of all others are kept.
    keep_copies: chance that a converted copy that the forward pass makes is kept.
    offload: chance that what would be kept waits on the host instead.
    """
    choices = _random_choices(stated, rng)
    again = frozenset(
        i for i, op in enumerate(stated.problem.ops) if op.recompute_time is not None and rng.random() < recompute
    )
    copies = [copy for copy in _forward_copies(stated, choices) if rng.random() < keep_copies]
    solution = Solution(choices, again, frozenset(), frozenset(copies))
    decisions = stated.decisions(solution)
    forward = {n.name for n in trace.graph_module.graph.nodes if n.op == "call_function" and not is_backward(n)}
    run_once = {name for name in forward if name not in decisions.nodes or not decisions.nodes[name].recompute}
    kept = frozenset(v for v in stated.value_index if v.split("#")[0] in run_once)
    away = frozenset(v for v in sorted(kept) if rng.random() < offload)
    return replace(decisions, kept=kept - away, offloaded=away)


def _random_choices(stated: ShardingProblem, rng: random.Random) -> tuple[int, ...]:
    values = stated.problem.values
    made: dict[int, int] = {}
    choices: list[int] = []
    for op in stated.problem.ops:
        reachable = [
            i
            for i, choice in enumerate(op.choices)
            if all(np.isfinite(values[v].convert_s[made[v], s]) for v, s in zip(op.operands, choice.uses, strict=True))
        ]
        choices.append(choices[op.tied_to] if op.tied_to is not None else rng.choice(reachable))
        made.update(zip(op.results, op.choices[choices[-1]].makes, strict=True))
    return tuple(choices)


def _forward_copies(stated: ShardingProblem, choices: tuple[int, ...]) -> list[tuple[int, int]]:
    """(value, state) of every conversion that the forward pass makes, in order."""
    problem = stated.problem
    made: dict[int, int] = {}
    found: dict[tuple[int, int], None] = {}
    for op, choice in zip(problem.ops[: problem.forward_ops], choices, strict=False):
        picked = op.choices[choice]
        for value, state in zip(op.operands, picked.uses, strict=True):
            if made[value] != state:
                found[value, state] = None
        made.update(zip(op.results, picked.makes, strict=True))
    return list(found)
