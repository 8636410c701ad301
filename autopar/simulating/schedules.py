"""Pipeline schedules: in which order each stage runs the passes of its micro-batches. Plain data, free of torch.

    gpipe        all forward passes, then all backward passes (Huang et al. 2019)
    1f1b         as few forward passes as keep all stages busy, then one forward, one backward (Narayanan et al. 2019)
    interleaved  the same over v chunks of layers a stage, so that a bubble lasts a v-th (Narayanan et al. 2021)
    zero-bubble  1f1b with gradients of weights apart, which fill the bubble (Qi et al. 2023, ZB-H1)

Chunk c of stage i is the (c * stages + i)-th stretch of the model: micro-batches go around the stages once a chunk.
The orders are those of `torch.distributed.pipelining` (Schedule1F1B, ScheduleInterleaved1F1B and, with one chunk,
ScheduleInterleavedZeroBubble); `tests/simulating/test_schedules.py` compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from autopar.errors import AutoparError, LayoutError

FORWARD = "forward"
BACKWARD = "backward"  # gradients of inputs and of weights
INPUTS = "input gradients"  # the part of a backward pass that the stage before waits for
WEIGHTS = "weight gradients"  # the part that nobody waits for


class Action(NamedTuple):
    """One pass of one micro-batch through one chunk of a stage."""

    kind: str
    micro_batch: int
    chunk: int = 0


Order = tuple[Action, ...]


def schedule_orders(schedule: str, stages: int, micro_batches: int, chunks: int = 1) -> tuple[Order, ...]:
    """What each stage runs, first to last.

    schedule: as in a layout; "none" (one stage) runs each micro-batch forward and backward.
    Raises LayoutError for an unknown schedule, or one that cannot be run with so many micro-batches or chunks.
    """
    if schedule not in _ORDERS:
        raise LayoutError(f"layout: unknown schedule={schedule}; give one of {', '.join(_ORDERS)}")
    if (chunks > 1) != (schedule == "interleaved"):
        raise LayoutError(f"layout: schedule={schedule} does not go with {chunks} chunks a stage (vpp={chunks})")
    if chunks > 1 and micro_batches % stages:
        raise LayoutError(
            f"layout: the interleaved schedule needs a multiple of pp={stages} micro-batches, found {micro_batches}; "
            "change micro_batch or the batch, or leave vpp out"
        )
    return tuple(_ORDERS[schedule](stages, micro_batches, chunks, at) for at in range(stages))


def check_orders(orders: Sequence[Order], micro_batches: int, chunks: int) -> None:
    """Every stage runs every pass once, backward after forward; AutoparError if not. `orders` may be anybody's."""
    for at, order in enumerate(orders):
        place = {action: index for index, action in enumerate(order)}
        expected = 0
        for micro_batch in range(micro_batches):
            for chunk in range(chunks):
                passes = [Action(k, micro_batch, chunk) for k in (FORWARD, BACKWARD, INPUTS, WEIGHTS)]
                found = [place[a] for a in passes if a in place]
                kinds = tuple(a.kind for a in passes if a in place)
                expected += len(kinds)
                if kinds not in ((FORWARD, BACKWARD), (FORWARD, INPUTS, WEIGHTS)) or found != sorted(found):
                    raise AutoparError(
                        f"the schedule of stage {at} does not run micro-batch {micro_batch} of chunk {chunk} forward "
                        "and then backward; add or move its passes"
                    )
        if expected != len(order):
            raise AutoparError(f"the schedule of stage {at} has {len(order)} passes, not {expected}; drop the others")


def warm_up(schedule: str, stages: int, micro_batches: int, chunks: int, at: int) -> int:
    """Forward passes that stage `at` runs before forward and backward passes alternate."""
    if schedule == "gpipe":
        return micro_batches
    ahead = stages - 1 - at
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * stages
    return min(micro_batches * chunks, ahead)


def _gpipe(stages: int, micro_batches: int, chunks: int, at: int) -> Order:
    forward = [Action(FORWARD, k) for k in range(micro_batches)]
    return (*forward, *(Action(BACKWARD, k) for k in range(micro_batches)))


def _alternating(stages: int, micro_batches: int, chunks: int, at: int) -> Order:
    """1f1b, of one chunk or several."""
    total = micro_batches * chunks
    ahead = warm_up("interleaved" if chunks > 1 else "1f1b", stages, micro_batches, chunks, at)
    order = [_nth(FORWARD, k, stages, chunks) for k in range(ahead)]
    for k in range(total):
        if ahead + k < total:
            order.append(_nth(FORWARD, ahead + k, stages, chunks))
        order.append(_nth(BACKWARD, k, stages, chunks))
    return tuple(order)


def _nth(kind: str, k: int, stages: int, chunks: int) -> Action:
    """The k-th pass of a kind: as many micro-batches as there are stages through each chunk, then the next ones.

    Backward passes begin with the last chunk.
    """
    turn, place = divmod(k, stages)
    group, chunk = divmod(turn, chunks)
    return Action(kind, group * stages + place, chunk if kind == FORWARD else chunks - 1 - chunk)


def _zero_bubble(stages: int, micro_batches: int, chunks: int, at: int) -> Order:
    """Stage `at` puts `at` weight gradients off, so that all stages hold as many micro-batches as the first one."""
    ahead = warm_up("zero-bubble", stages, micro_batches, chunks, at)
    order = [Action(FORWARD, k) for k in range(ahead)]
    for k in range(micro_batches):
        if ahead + k < micro_batches:
            order.append(Action(FORWARD, ahead + k))
        order.append(Action(INPUTS, k))
        if k >= at:
            order.append(Action(WEIGHTS, k - at))
    order += [Action(WEIGHTS, k) for k in range(max(0, micro_batches - at), micro_batches)]
    return tuple(order)


_ORDERS = {
    "none": _alternating,
    "gpipe": _gpipe,
    "1f1b": _alternating,
    "interleaved": _alternating,
    "zero-bubble": _zero_bubble,
}
