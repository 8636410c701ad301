"""When bytes are alive: the one place that fixes the meaning of time for memory.

Time is the index of an op, 0 .. T-1. All spans include both ends and are static: they
cover every use that may happen, whether or not it does (an op that may run again counts
as a use at its `recompute_time`). For a value made by op o, with `bytes` those of the
state in question:

    what                            bytes of      span
    original (`base`)               made state    [o, last use in its own pass]; [o, o] if unused;
                                                  [o, T-1] if `live_out`
    original, kept (`kept`)         made state    (end of base, last backward use]
    original, offloaded (`fetched`) made state    [first backward use, last backward use]
    original, made again (`rerun`)  made state    [recompute_time, max(recompute_time, last backward use)]
    converted in its own pass       target        [first use, last use] in that pass;
      (`own_copy`)                                to T-1 if a `live_out` backward value
    such a copy, kept (`kept_copy`) target        (last use in own pass, last backward use]
    converted in the backward pass  target        [first backward use, last backward use]
      (`later_copy`), of a forward value

The own pass of a value is the pass of the op that makes it. Its uses there are `own_uses`;
a forward value may also have `later_uses`, in the backward pass: by backward ops, and by
forward ops that run again. An original that is both kept and made again counts twice.
Originals of `always_available` values count nothing here. A `live_out` forward value is
there at all times after it is made, so there is nothing to keep. What is offloaded leaves at the end of `base`: the
copy is done before the next op starts.

Results of an op with `results_start_next` start at o+1: they are the (converted) operand.
If the operand is converted there, the results count at o too (source and copy both
exist); and a conversion that only such uses want is not counted apart from the results.

A use in the backward pass is *early* if it comes before the value's op would run again:
then a rerun does not help it. At the same time it does help, since ops that run again
before one op do so in the order of the problem.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autopar.solver.problem import Op, Problem

Span = tuple[int, int]  # first and last time, both included
Kinds = list[list[int]]  # the values of a problem, those together that do the same in identical layers


@dataclass(frozen=True)
class Use:
    """One op that takes a value in one or more of its slots, always in the same state.

    time: when it takes it.
    rerun: it is the op running again (it wants the value only if it does).
    early: before the op that makes the value would run again.
    alias: its result is the converted operand itself (`results_start_next`).
    """

    op: int
    slot: int
    time: int
    rerun: bool = False
    early: bool = False
    alias: bool = False


@dataclass(frozen=True)
class ValueLife:
    """Who makes and uses a value, and the spans of the table above (None where empty).

    needs_keeping: whether its original is gone in the backward pass unless something is done.
    """

    made_by: int
    result: int
    forward: bool
    needs_keeping: bool
    own_uses: tuple[Use, ...]
    later_uses: tuple[Use, ...]
    base: Span | None
    kept: Span | None
    fetched: Span | None
    rerun: Span | None
    own_copy: Span | None
    kept_copy: Span | None
    later_copy: Span | None


def lifetimes(problem: Problem) -> tuple[ValueLife, ...]:
    """The life of every value of a problem that `check_problem` accepts."""
    makers = {v: (o, r) for o, op in enumerate(problem.ops) for r, v in enumerate(op.results)}
    own: list[list[Use]] = [[] for _ in problem.values]
    later: list[list[Use]] = [[] for _ in problem.values]
    for o, op in enumerate(problem.ops):
        for slot in distinct_slots(op):
            v = op.operands[slot]
            maker, _ = makers[v]
            again = problem.ops[maker].recompute_time
            if maker < problem.forward_ops <= o:
                later[v].append(Use(o, slot, o, False, again is not None and again > o, op.results_start_next))
            else:
                own[v].append(Use(o, slot, o, alias=op.results_start_next))
            if op.recompute_time is not None:
                early = again is not None and again > op.recompute_time
                later[v].append(Use(o, slot, op.recompute_time, True, early))
    return tuple(_life(problem, v, makers[v], own[v], later[v]) for v in range(len(problem.values)))


def roots(problem: Problem) -> npt.NDArray[np.int64]:
    """Per op, the first of those whose choice it shares: of its twins, and of what it is tied to."""
    found = np.arange(len(problem.ops))
    for o, op in enumerate(problem.ops):
        leader = op.twin_of if op.twin_of is not None else op.tied_to
        if leader is not None:
            found[o] = found[leader]
    return found


def value_kinds(problem: Problem, lives: tuple[ValueLife, ...]) -> Kinds:
    """The values that do the same in identical layers, together: made by twins and used, one by one, by twins."""
    first = [o if op.twin_of is None else op.twin_of for o, op in enumerate(problem.ops)]
    found: dict[tuple[object, ...], list[int]] = {}
    for v, (value, life) in enumerate(zip(problem.values, lives, strict=True)):
        uses = [
            tuple((first[u.op], u.slot, u.rerun, u.early, u.alias) for u in some)
            for some in (life.own_uses, life.later_uses)
        ]
        flags = (life.forward, life.needs_keeping, value.always_available, value.live_out, value.may_keep)
        costs = (value.state_bytes, id(value.convert_s), value.offload_s)
        kind = (first[life.made_by], life.result, *uses, *costs, flags, value.fleeting)
        found.setdefault(kind, []).append(v)
    return list(found.values())


def distinct_slots(op: Op) -> list[int]:
    """The slots of an op less those that take the same value in the same state in every choice."""
    if len(set(op.operands)) == len(op.operands):  # by far the most
        return list(range(len(op.operands)))
    seen: dict[tuple[int, tuple[int, ...]], int] = {}
    for slot, v in enumerate(op.operands):
        seen.setdefault((v, tuple(c.uses[slot] for c in op.choices)), slot)
    return list(seen.values())


def distinct_uses(problem: Problem, uses: tuple[Use, ...]) -> list[Use]:
    """Uses of one value, less those that a twin makes as well: it takes the value in the same state. Uses that hold
    memory of their own (`alias`) all stay."""
    found: dict[tuple[object, ...], Use] = {}
    for use in uses:
        twin = problem.ops[use.op].twin_of
        first = use.op if twin is None or use.alias else twin
        found.setdefault((first, use.slot, use.rerun, use.early, use.alias), use)
    return list(found.values())


def _life(problem: Problem, v: int, made: tuple[int, int], own: list[Use], later: list[Use]) -> ValueLife:
    value, (o, result) = problem.values[v], made
    maker = problem.ops[o]
    end_of_time = len(problem.ops) - 1
    forward = o < problem.forward_ops
    last_own = max((u.time for u in own), default=o)
    first_later = min((u.time for u in later), default=-1)
    last_later = max((u.time for u in later), default=-1)
    base_end = end_of_time if value.live_out else last_own
    base = None if value.always_available else _span(o + maker.results_start_next, base_end)
    copy_end = end_of_time if value.live_out and not forward else last_own
    needs_keeping = bool(later) and not value.always_available and not value.live_out
    again = maker.recompute_time
    rerun = (again, max(again, last_later)) if again is not None and not value.always_available else None
    return ValueLife(
        made_by=o,
        result=result,
        forward=forward,
        needs_keeping=needs_keeping,
        own_uses=tuple(own),
        later_uses=tuple(later),
        base=base,
        kept=_span(base_end + 1, last_later) if needs_keeping else None,
        fetched=_span(first_later, last_later) if needs_keeping else None,
        rerun=rerun,
        own_copy=_span(min(u.time for u in own), copy_end) if own else None,
        kept_copy=_span(last_own + 1, last_later) if own and later else None,
        later_copy=_span(first_later, last_later) if later else None,
    )


def _span(first: int, last: int) -> Span | None:
    return (first, last) if first <= last else None
