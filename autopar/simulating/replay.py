"""When everything would run if every rank had a processor of its own: the steps that a pipeline executes, replayed.

    what each rank executes, message by message (`runtime/schedule.py`), and how long each pass takes
      -> when each pass starts and ends

A rank runs its steps one after the other. Sends and receives take no time of its own: a pass starts when the passes
before it have ended and what it takes was sent, `send_s` ago. Nothing is assumed of the schedule: the steps are
those of the program, and a pass whose message nobody has sent yet waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autopar.errors import AutoparError
from autopar.simulating.schedules import FORWARD, WEIGHTS

SEND_FORWARD, SEND_BACKWARD = "send forward", "send backward"
RECEIVE_FORWARD, RECEIVE_BACKWARD = "receive forward", "receive backward"
_RECEIVE_OF = {SEND_FORWARD: RECEIVE_FORWARD, SEND_BACKWARD: RECEIVE_BACKWARD}
MESSAGES = (*_RECEIVE_OF, *_RECEIVE_OF.values())


class Step(NamedTuple):
    """What a rank executes: a pass (`schedules.FORWARD` ...) or a message of one micro-batch on one stage."""

    kind: str
    stage: int
    micro_batch: int


class PassTime(NamedTuple):
    """One pass."""

    step: Step
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Replay:
    """passes: of each rank, in order."""

    passes: tuple[tuple[PassTime, ...], ...]

    @property
    def end_s(self) -> float:
        """When the last pass of all ends."""
        return max(one.end_s for rank in self.passes for one in rank)

    @property
    def idle_share(self) -> tuple[float, ...]:
        """Of each rank: the share of the time until all have ended in which it runs no pass."""
        end_s = self.end_s
        return tuple(1 - sum(one.end_s - one.start_s for one in rank) / end_s for rank in self.passes)


def replay(ranks: Sequence[Sequence[Step]], seconds: Callable[[Step], float], send_s: float = 0.0) -> Replay:
    """Run the steps of all ranks on simulated time.

    seconds: that a pass takes. Raises AutoparError where ranks wait for each other for ever.
    """
    stages = 1 + max(step.stage for steps in ranks for step in steps)
    arrived: dict[Step, float] = {}  # by the receive that takes it
    done, now_s = [0] * len(ranks), [0.0] * len(ranks)
    passes: list[list[PassTime]] = [[] for _ in ranks]
    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(ranks):
            while done[rank] < len(steps):
                step = steps[done[rank]]
                if step.kind in _RECEIVE_OF:
                    arrived[_received(step)] = now_s[rank] + send_s
                elif step.kind not in MESSAGES:
                    message = _takes(step, stages)
                    if message is not None and message not in arrived:
                        break
                    start_s = max(now_s[rank], 0.0 if message is None else arrived[message])
                    now_s[rank] = start_s + seconds(step)
                    passes[rank].append(PassTime(step, start_s, now_s[rank]))
                done[rank], moved = done[rank] + 1, True
    for rank, steps in enumerate(ranks):
        if done[rank] < len(steps):
            raise AutoparError(f"the schedule stands still: rank {rank} waits for ever before {steps[done[rank]]}")
    return Replay(tuple(tuple(one) for one in passes))


def _received(send: Step) -> Step:
    to = send.stage + (1 if send.kind == SEND_FORWARD else -1)
    return Step(_RECEIVE_OF[send.kind], to, send.micro_batch)


def _takes(step: Step, stages: int) -> Step | None:
    """The message that a pass takes; None for those at the ends of the pipeline, and for gradients of weights."""
    if step.kind == FORWARD:
        return Step(RECEIVE_FORWARD, step.stage, step.micro_batch) if step.stage else None
    if step.kind == WEIGHTS or step.stage == stages - 1:
        return None
    return Step(RECEIVE_BACKWARD, step.stage, step.micro_batch)
