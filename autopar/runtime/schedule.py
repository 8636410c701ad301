"""One step of a pipeline on this rank: torch's schedule runtime, fed with autopar's orders.

The orders say only what each rank computes (`autopar/simulating/schedules.py`). torch puts every receive where the
sender has sent, which is long before it is waited for, and lets sends go while the next pass runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autopar._torch_compat import schedule_runtime
from autopar.runtime.stage import Stage
from autopar.simulating.replay import RECEIVE_BACKWARD, RECEIVE_FORWARD, SEND_BACKWARD, SEND_FORWARD, Step
from autopar.simulating.schedules import BACKWARD, FORWARD, INPUTS, WEIGHTS, Order

_KINDS = {FORWARD: "FORWARD", BACKWARD: "FULL_BACKWARD", INPUTS: "BACKWARD_INPUT", WEIGHTS: "BACKWARD_WEIGHT"}
_MESSAGES = {
    SEND_FORWARD: "SEND_F",
    RECEIVE_FORWARD: "RECV_F",
    SEND_BACKWARD: "SEND_B",
    RECEIVE_BACKWARD: "RECV_B",
}
_WORDS = {theirs: ours for ours, theirs in {**_KINDS, **_MESSAGES}.items()}


class Schedule:
    """The passes of this rank's stages in the order of a schedule, with the messages between them.

    stages: of this rank, first to last. orders: of every pipeline rank. Chunk c of rank i is stage c * ranks + i.
    """

    def __init__(self, stages: Sequence[Stage], orders: Sequence[Order], micro_batches: int) -> None:
        runtime, action, kinds = schedule_runtime()
        self.micro_batches = micro_batches
        self.stages = list(stages)
        self._runtime = runtime(self.stages, micro_batches, scale_grads=False)
        self._runtime._prepare_schedule_with_comms(
            {
                rank: [
                    action(one.chunk * len(orders) + rank, getattr(kinds, _KINDS[one.kind]), one.micro_batch)
                    for one in order
                ]
                for rank, order in enumerate(orders)
            }
        )
        # torch would ask the stages for shapes by running them; ours know theirs.
        self._runtime._initialize_stages = _nothing_to_ask

    @property
    def steps(self) -> tuple[tuple[Step, ...], ...]:
        """What every pipeline rank executes: the passes of `orders`, and the messages that torch put between them."""
        lowered = self._runtime.pipeline_order_with_comms
        found = [[(_WORDS.get(a.computation_type.name), a) for a in lowered[rank]] for rank in sorted(lowered)]
        return tuple(tuple(Step(word, a.stage_index, a.microbatch_index) for word, a in rank if word) for rank in found)

    def run(self) -> None:
        """Run every pass of this rank once."""
        self._runtime._step_microbatches(return_outputs=False)

    def run_forward(self) -> None:
        """Run the forward passes alone, in the order in which a step has them."""
        everything, forward = self._runtime.pipeline_order_with_comms, (FORWARD, SEND_FORWARD, RECEIVE_FORWARD)
        self._runtime.pipeline_order_with_comms = {
            rank: [one for one in actions if _WORDS.get(one.computation_type.name) in forward]
            for rank, actions in everything.items()
        }
        try:
            self._runtime._step_microbatches(return_outputs=False)
        finally:
            self._runtime.pipeline_order_with_comms = everything


def _nothing_to_ask(*_: Any) -> None:
    """What the runtime calls before the first pass."""
