"""When everything runs: every stage follows its order of passes and waits for what the others send.

The event is the end of a send: it wakes the stage that waits for it. Each lane of a stage runs what was issued to it in
that order (as streams do), so what a task starts after is known once it is issued, and one visit a pass is enough: no
clock, no queue of all events. It also makes the step monotone: nothing that gets shorter makes anything end later.

A send occupies the sender's pipeline lane, and nobody waits for it but the receiver. The host launches one pass after
the other, ahead of the device, but learns what comes from another stage when it is there; a pass ends no earlier than
its launch. A step ends with

    reductions of gradients -> exchange of tied ones -> (all stages) -> optimizer -> parameters come back

where the optimizer waits for all stages, as it clips by the norm of all gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from autopar.errors import AutoparError
from autopar.simulating.costs import COMPUTE, DATA, HOST, HOST_LINK, PIPELINE, TENSOR, PassCost, StepCost
from autopar.simulating.schedules import BACKWARD, FORWARD, WEIGHTS, Action, Order, check_orders, schedule_orders


class Task(NamedTuple):
    """Something that occupies a lane of one stage. micro_batch, chunk: -1 where it belongs to none."""

    stage: int
    lane: str
    name: str
    micro_batch: int
    chunk: int
    start_s: float
    end_s: float


class PassRun(NamedTuple):
    """One pass, from the start of its first piece to the end of its last."""

    action: Action
    start_s: float
    end_s: float


@dataclass
class StageRun:
    """One stage at work. free_s: when each lane is done with what was issued to it. now_s: end of the last pass."""

    at: int
    order: Order
    tasks: list[Task] = field(default_factory=list)
    passes: list[PassRun] = field(default_factory=list)
    free_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    now_s: float = 0.0
    last_ends: dict[tuple[int, int], float] = field(default_factory=dict)

    def issue(self, lane: str, name: str, seconds: float, after_s: float, action: Action | None = None) -> float:
        """Put a task on a lane; its end. Nothing is put there if it takes no time."""
        if seconds <= 0:
            return after_s
        start = max(self.free_s[lane], after_s)
        end = start + seconds
        micro_batch, chunk = (action.micro_batch, action.chunk) if action else (-1, -1)
        self.tasks.append(Task(self.at, lane, name, micro_batch, chunk, start, end))
        self.free_s[lane] = end
        return end


def run_step(cost: StepCost, orders: Sequence[Order] | None = None) -> list[StageRun]:
    """Run one training step. orders: of the passes on each stage, if they are not those of the schedule.

    Raises AutoparError for orders that leave something out or where stages wait for each other for ever.
    """
    if orders is None:
        chunks = len(cost.stages[0].chunks)
        orders = schedule_orders(cost.schedule, len(cost.stages), cost.micro_batches, chunks)
    else:
        check_orders(orders, cost.micro_batches, len(cost.stages[0].chunks))
    pipeline = _Pipeline(cost, orders)
    pipeline.run()
    _finish(cost, pipeline.stages)
    return pipeline.stages


class _Pipeline:
    """All passes of all stages. arrivals: (forward or not, stretch of the model, micro-batch) -> seconds."""

    def __init__(self, cost: StepCost, orders: Sequence[Order]) -> None:
        self.cost = cost
        self.stages = [StageRun(at, order) for at, order in enumerate(orders)]
        self.arrivals: dict[tuple[bool, int, int], float] = {}
        self.waiting: dict[tuple[bool, int, int], StageRun] = {}
        self.stretches = len(orders) * len(cost.stages[0].chunks)

    def run(self) -> None:
        """Let every stage go on until all are done or all wait."""
        ready, done = self.stages[::-1], [0] * len(self.stages)
        while ready:
            stage = ready.pop()
            while done[stage.at] < len(stage.order):
                action = stage.order[done[stage.at]]
                key = self._needs(stage, action)
                if key is not None and key not in self.arrivals:
                    self.waiting[key] = stage
                    break
                done[stage.at] += 1
                woken = self._run(stage, action, self.arrivals[key] if key is not None else 0.0)
                if woken is not None:
                    ready.append(woken)
        for key, stage in self.waiting.items():
            raise AutoparError(_standstill(stage, stage.order[done[stage.at]], key))

    def _needs(self, stage: StageRun, action: Action) -> tuple[bool, int, int] | None:
        """What must have arrived before a pass; None: nothing, it works on what the stage has."""
        stretch = action.chunk * len(self.stages) + stage.at
        if action.kind == FORWARD:
            return (True, stretch, action.micro_batch) if stretch else None
        return None if action.kind == WEIGHTS else (False, stretch, action.micro_batch)

    def _run(self, stage: StageRun, action: Action, arrived_s: float) -> StageRun | None:
        """Launch a pass, run it and send its result on; the stage that waited for that, if one did."""
        cost = self.cost.stages[stage.at].chunks[action.chunk].passes[action.kind]
        ready_s = max(stage.now_s, arrived_s)
        stretch = action.chunk * len(self.stages) + stage.at
        foreign = self._comes_from_elsewhere(action, stretch)
        if foreign:
            ready_s = stage.issue(TENSOR, "unpack", self.cost.unpack_s, ready_s, action)
        launched_s = stage.issue(HOST, f"launch {action.kind}", cost.host_s, arrived_s if foreign else 0.0, action)
        last = action.micro_batch == self.cost.micro_batches - 1 and action.kind in (BACKWARD, WEIGHTS)
        begin_s, end_s = _run_pass(stage, cost, action, max(ready_s, launched_s - cost.host_s), last)
        stage.now_s = max(end_s, launched_s)
        stage.passes.append(PassRun(action, begin_s, stage.now_s))
        return None if action.kind == WEIGHTS else self._send(stage, action, stretch)

    def _comes_from_elsewhere(self, action: Action, stretch: int) -> bool:
        if action.kind == FORWARD:
            return stretch > 0
        return action.kind != WEIGHTS and stretch < self.stretches - 1

    def _send(self, stage: StageRun, action: Action, stretch: int) -> StageRun | None:
        forward, end_s = action.kind == FORWARD, stage.now_s
        if forward and stretch == self.stretches - 1:
            key = (False, stretch, action.micro_batch)  # the loss is here: the way back begins
        elif not forward and stretch == 0:
            return None
        else:
            key = (forward, stretch + (1 if forward else -1), action.micro_batch)
            name = "send activations" if forward else "send gradients"
            end_s = stage.issue(PIPELINE, name, self.cost.send_s, end_s, action)
        self.arrivals[key] = end_s
        return self.waiting.pop(key, None)


def _standstill(stage: StageRun, action: Action, key: tuple[bool, int, int]) -> str:
    return (
        f"the schedule stands still: stage {stage.at} waits with the {action.kind} pass of micro-batch "
        f"{action.micro_batch} (chunk {action.chunk}) for what {'comes before it' if key[0] else 'follows it'}, which "
        "waits in turn; change the order of passes"
    )


def _run_pass(stage: StageRun, cost: PassCost, action: Action, ready_s: float, last: bool) -> tuple[float, float]:
    """Issue the pieces of one pass; when the device begins and ends it. last: note when each piece ends."""
    pieces, name = cost.pieces, action.kind
    gathered_s = _gather(stage, cost, 0, action, stage.now_s)
    now_s = begin_s = max(ready_s, gathered_s)
    for index, piece in enumerate(pieces):
        now_s = max(now_s, gathered_s)
        gathered_s = _gather(stage, cost, index + 1, action, now_s)
        now_s = stage.issue(COMPUTE, f"{name}, {piece.name}", piece.compute_s, now_s, action)
        for lane, seconds in piece.messages:
            now_s = stage.issue(lane, f"{name}, {piece.name}", seconds, now_s, action)
        if piece.scatter_s:
            stage.issue(DATA, f"scatter, {piece.name}", piece.scatter_s, now_s, action)
        if last:
            stage.last_ends[action.chunk, index] = now_s
    return begin_s, now_s


def _gather(stage: StageRun, cost: PassCost, index: int, action: Action, after_s: float) -> float:
    """Ask for the parameters of a piece; when they are there."""
    if index >= len(cost.pieces) or not cost.pieces[index].gather_s:
        return 0.0
    piece = cost.pieces[index]
    return stage.issue(DATA, f"gather, {piece.name}", piece.gather_s, after_s, action)


def _finish(cost: StepCost, stages: list[StageRun]) -> None:
    """What follows the passes."""
    ready_s = [_reduce(cost, stage) for stage in stages]
    tied = [s for s in stages if cost.stages[s.at].tied_s]
    together_s = max((max(ready_s[s.at], s.free_s[PIPELINE]) for s in tied), default=0.0)
    for stage in tied:
        seconds = cost.stages[stage.at].tied_s
        ready_s[stage.at] = stage.issue(PIPELINE, "exchange tied gradients", seconds, together_s)
    everybody_s = max(ready_s)
    for stage in stages:
        own = cost.stages[stage.at]
        there_s = everybody_s
        if own.state_copy_s:
            there_s = stage.issue(HOST_LINK, "state from the host", own.state_copy_s, everybody_s)
        done_s = stage.issue(COMPUTE, "optimizer", own.optimizer_s, there_s)
        if own.state_copy_s:
            done_s = stage.issue(HOST_LINK, "state to the host", own.state_copy_s, done_s)
        for seconds in own.returned_s:
            stage.issue(DATA, "gather parameters", seconds, done_s)


def _reduce(cost: StepCost, stage: StageRun) -> float:
    """Reduce the gradients of a stage; when all are there."""
    for reduction in cost.stages[stage.at].reductions:
        after_s = stage.now_s if reduction.after is None else stage.last_ends[reduction.after]
        stage.issue(DATA, "reduce gradients", reduction.seconds, after_s)
    return max(stage.now_s, stage.free_s[DATA])
