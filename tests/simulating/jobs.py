"""Steps for the simulator that are made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.simulating.costs import TENSOR, ChunkCost, PassCost, Piece, StageCost, StepCost
from autopar.simulating.schedules import BACKWARD, FORWARD, INPUTS, WEIGHTS

Seconds = tuple[float, float, float]  # of a stage: forward, gradients of inputs, gradients of weights


def step(
    schedule: str,
    stages: Sequence[Seconds],
    micro_batches: int,
    chunks: int = 1,
    *,
    send_s: float = 0.0,
    message_s: float = 0.0,
    host_s: float = 0.0,
) -> StepCost:
    """A step without an end: passes and sends only, each stage cut evenly into its chunks."""

    def one(seconds: float) -> PassCost:
        messages = ((TENSOR, message_s),) if message_s else ()
        return PassCost((Piece("block", seconds / chunks, messages),), host_s)

    def stage(forward: float, inputs: float, weights: float) -> StageCost:
        passes = {FORWARD: one(forward), BACKWARD: one(inputs + weights), INPUTS: one(inputs), WEIGHTS: one(weights)}
        return StageCost((ChunkCost(passes, kept_bytes=1.0),) * chunks)

    return StepCost(tuple(stage(*seconds) for seconds in stages), micro_batches, schedule, send_s)
