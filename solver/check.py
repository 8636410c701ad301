"""Is a problem well formed? Everything else in the solver relies on what is checked here."""

from __future__ import annotations

import numpy as np

from autopar.solver.problem import Choice, Op, Problem, Value


def check_problem(problem: Problem) -> None:
    """Raise ValueError (what, where, what to do) unless the problem keeps its contract."""
    if not 0 <= problem.forward_ops <= len(problem.ops):
        raise ValueError(f"forward_ops is {problem.forward_ops}, but there are {len(problem.ops)} ops: correct it")
    tables = {
        (id(v.convert_s), id(v.state_bytes), id(v.offload_s)): v for v in reversed(problem.values)
    }  # identical layers share them
    for value in reversed(tables.values()):
        _check_value(value)
    made: set[int] = set()
    seen: set[tuple[int, ...]] = set()
    for o, op in enumerate(problem.ops):
        unmade = [v for v in op.operands if v not in made]
        if unmade:
            raise ValueError(f"op {op.name!r} takes value {unmade[0]} before it is made: put the ops in order")
        again = [v for v in op.results if v in made or not 0 <= v < len(problem.values)]
        if again or len(set(op.results)) < len(op.results):
            raise ValueError(f"op {op.name!r} makes {op.results}, not new values of the problem: correct its results")
        made.update(op.results)
        _check_op(problem, o, op, seen)
    if len(made) < len(problem.values):
        missing = next(v for v in range(len(problem.values)) if v not in made)
        raise ValueError(f"no op makes value {problem.values[missing].name!r}: remove it or add its op")


def _check_value(value: Value) -> None:
    n = len(value.state_bytes)
    if value.convert_s.shape != (n, n):
        raise ValueError(f"value {value.name!r} has {n} states but convert_s of shape {value.convert_s.shape}")
    if np.isnan(value.convert_s).any() or (value.convert_s < 0).any() or np.diagonal(value.convert_s).any():
        raise ValueError(f"convert_s of value {value.name!r} must be >= 0 with a zero diagonal: correct the costs")
    if min(value.state_bytes, default=0) < 0:
        raise ValueError(f"value {value.name!r} has a state of negative size: correct state_bytes")
    if value.offload_s is not None and (len(value.offload_s) != n or not all(s >= 0 for s in value.offload_s)):
        raise ValueError(f"offload_s of value {value.name!r} must be {n} numbers >= 0, one per state: correct it")


def _check_op(problem: Problem, o: int, op: Op, seen: set[tuple[int, ...]]) -> None:
    if not op.choices:
        raise ValueError(f"op {op.name!r} has no choice: give it at least one")
    sizes = [len(problem.values[v].state_bytes) for v in (*op.operands, *op.results)]
    if (id(op.choices), *sizes) not in seen:  # identical layers share their choices
        seen.add((id(op.choices), *sizes))
        for choice in op.choices:
            _check_choice(problem, op, choice)
    if op.must_rerun and op.recompute_time is None:
        raise ValueError(f"op {op.name!r} must run again but has no recompute_time")
    if op.recompute_time is not None and not o < problem.forward_ops <= op.recompute_time < len(problem.ops):
        raise ValueError(f"op {op.name!r} may run again at {op.recompute_time}, not a forward op at a backward time")
    if op.tied_to is not None:
        tied_to = problem.ops[op.tied_to] if 0 <= op.tied_to < o else None
        if tied_to is None or len(tied_to.choices) != len(op.choices):
            raise ValueError(f"op {op.name!r} is tied to {op.tied_to}, not an earlier op with as many choices")
    if op.twin_of is not None:
        twin = problem.ops[op.twin_of] if 0 <= op.twin_of < o else None
        if twin is None or twin.twin_of is not None or not _like(op, twin):
            raise ValueError(f"op {op.name!r} is no twin of op {op.twin_of}: that must be earlier and offer the same")
    if op.results_start_next:
        if len(op.operands) != 1 or len(op.results) != 1 or op.recompute_time is not None:
            raise ValueError(f"op {op.name!r}: results_start_next wants one operand, one result, and no recompute_time")
        size = problem.values[op.results[0]].state_bytes
        found: dict[int, int] = {}
        if any(found.setdefault(c.uses[0], size[c.makes[0]]) != size[c.makes[0]] for c in op.choices):
            raise ValueError(f"op {op.name!r}: results_start_next wants the size of the result to follow from its use")


def _like(op: Op, twin: Op) -> bool:
    """Whether two ops offer the same choices, at whatever cost."""
    same = op.choices is twin.choices  # most often
    if not same and [(c.uses, c.makes) for c in op.choices] != [(c.uses, c.makes) for c in twin.choices]:
        return False
    return (op.recompute_time is None) == (twin.recompute_time is None)


def _check_choice(problem: Problem, op: Op, choice: Choice) -> None:
    if len(choice.uses) != len(op.operands) or len(choice.makes) != len(op.results):
        raise ValueError(f"a choice of op {op.name!r} does not name one state per operand and result: correct it")
    for v, state in zip((*op.operands, *op.results), (*choice.uses, *choice.makes), strict=True):
        if not 0 <= state < len(problem.values[v].state_bytes):
            raise ValueError(f"a choice of op {op.name!r} names state {state} of value {problem.values[v].name!r}")
    if not (np.isfinite(choice.cost_s) and choice.cost_s >= 0):
        raise ValueError(f"a choice of op {op.name!r} costs {choice.cost_s} s: costs are finite and not negative")
    if min(choice.workspace_bytes, choice.persistent_bytes, choice.host_bytes) < 0:
        raise ValueError(f"a choice of op {op.name!r} takes negative memory: correct it")
