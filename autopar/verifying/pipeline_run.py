"""Runs all stages of a pipeline in this one process, each on the simulated ranks of its mesh, by a schedule.

Every pipeline rank follows its own order, and can only go on when the messages that a pass takes have been sent:
ranks take turns, and where none can go on although passes are left, the schedule would hang on real ranks, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autopar.codegen.emit import Version
from autopar.codegen.fold import fold
from autopar.codegen.stage_types import Message, PipelineProgram, StagePass, StageProgram
from autopar.errors import VerifyError
from autopar.runtime.execute import bind_groups
from autopar.simulating.schedules import BACKWARD, FORWARD, INPUTS, WEIGHTS, Action, Order
from autopar.verifying.pipeline_case import Values

# Runs the graph of a pass: (stage, micro-batch, "forward" | "backward" | "weights" | "gather", inputs) -> results.
Runner = Callable[[int, int, str, list[Any]], Sequence[Any]]
_DOWN, _UP = "forward", "backward"


@dataclass
class _InFlight:
    """What one micro-batch has left on one stage."""

    versions: dict[Version, torch.Tensor] = field(default_factory=dict)


class PipelineRun:
    """One step of a pipeline.

    shared: parameters, buffers and constants, batches: inputs and the tangent per micro-batch; local tensors by
    placeholder. run: how to run a graph.
    """

    def __init__(self, program: PipelineProgram, shared: Values, batches: Sequence[Values], run: Runner) -> None:
        self.program, self.shared, self.batches, self.run = program, shared, batches, run
        self.messages: dict[tuple[str, int, int], list[torch.Tensor]] = {}
        self.outputs: list[dict[str, torch.Tensor]] = [{} for _ in batches]
        self.sums: list[dict[str, torch.Tensor]] = [{} for _ in program.stages]
        self._flying: dict[tuple[int, int], _InFlight] = {}
        self._gathered = [self._gather(stage) for stage in program.stages]

    def _gather(self, stage: StageProgram) -> dict[Version, torch.Tensor]:
        """What all micro-batches take of the stage's parameters."""
        if stage.gather is None:
            return {}
        with torch.no_grad():
            made = self.run(stage.index, 0, "gather", [self.shared[name] for name, _ in stage.gather.inputs])
        return dict(zip(stage.gathered, made, strict=True))

    def follow(self, orders: Sequence[Order]) -> None:
        """Run every rank's passes in its order; VerifyError where none can go on."""
        ranks = len(orders)
        done = [0] * ranks
        while any(done[rank] < len(order) for rank, order in enumerate(orders)):
            progress = False
            for rank, order in enumerate(orders):
                while done[rank] < len(order) and self._ready(
                    stage_at(order[done[rank]], rank, ranks), order[done[rank]]
                ):
                    self._pass(stage_at(order[done[rank]], rank, ranks), order[done[rank]])
                    done[rank] += 1
                    progress = True
            if not progress:
                waiting = [
                    f"rank {rank} waits for the {order[done[rank]].kind} of micro-batch {order[done[rank]].micro_batch}"
                    f" on stage {stage_at(order[done[rank]], rank, ranks)}"
                    for rank, order in enumerate(orders)
                    if done[rank] < len(order)
                ]
                raise VerifyError(f"deadlock: no stage of the pipeline can go on: {'; '.join(waiting)}")

    def _ready(self, stage: int, action: Action) -> bool:
        """Whether the message that a pass takes has been sent; messages of nothing are not sent at all."""
        program = self.program.stages[stage]
        if action.kind == FORWARD:
            return not program.receives_forward.values or (_DOWN, stage, action.micro_batch) in self.messages
        if action.kind == WEIGHTS:
            return True
        return not program.receives_backward.values or (_UP, stage, action.micro_batch) in self.messages

    def _pass(self, stage: int, action: Action) -> None:
        if action.kind == FORWARD:
            self._forward(stage, action.micro_batch)
        if action.kind in (BACKWARD, INPUTS):
            self._backward(stage, action.micro_batch)
        if action.kind in (BACKWARD, WEIGHTS):
            self._weights(stage, action.micro_batch)

    def _forward(self, stage: int, micro_batch: int) -> None:
        program, flying = self.program.stages[stage], _InFlight()
        self._flying[stage, micro_batch] = flying
        self._receive(_DOWN, stage, micro_batch, program.receives_forward)
        results = self._run(program.forward, "forward", stage, micro_batch)
        count = len(program.sends_forward.values)
        self._send(_DOWN, stage + 1, micro_batch, results[:count])
        outputs, saved = _split(results[count:], len(program.outputs))
        self.outputs[micro_batch].update(zip(program.outputs, outputs, strict=True))
        flying.versions = dict(zip(program.saved_forward, saved, strict=True))

    def _backward(self, stage: int, micro_batch: int) -> None:
        program, flying = self.program.stages[stage], self._flying[stage, micro_batch]
        self._receive(_UP, stage, micro_batch, program.receives_backward)
        results = self._run(program.backward, "backward", stage, micro_batch)
        count = len(program.sends_backward.values)
        self._send(_UP, stage - 1, micro_batch, results[:count])
        grads, saved = _split(results[count:], len(program.grads_early))
        self._add(stage, program.grads_early, grads)
        kept = {v: flying.versions[v] for v in program.saved_forward}
        flying.versions = {**kept, **dict(zip(program.saved_backward, saved, strict=True))}

    def _weights(self, stage: int, micro_batch: int) -> None:
        program = self.program.stages[stage]
        self._add(stage, program.grads_late, self._run(program.weights, "weights", stage, micro_batch))
        del self._flying[stage, micro_batch]

    def _run(self, one: StagePass, name: str, stage: int, micro_batch: int) -> list[torch.Tensor]:
        versions, batch = self._flying[stage, micro_batch].versions, self.batches[micro_batch]
        inputs: list[Any] = []
        for version in one.inputs:
            if version in versions:
                inputs.append(versions[version])
            elif version in self._gathered[stage]:
                inputs.append(self._gathered[stage][version])
            else:
                inputs.append(batch[version[0]] if version[0] in batch else self.shared[version[0]])
        with torch.no_grad():
            return list(self.run(stage, micro_batch, name, inputs))

    def _receive(self, direction: str, stage: int, micro_batch: int, message: Message) -> None:
        tensors = self.messages.pop((direction, stage, micro_batch)) if message.values else []
        self._flying[stage, micro_batch].versions.update(zip(message.values, tensors, strict=True))

    def _send(self, direction: str, stage: int, micro_batch: int, tensors: list[torch.Tensor]) -> None:
        if tensors:
            self.messages[direction, stage, micro_batch] = [t.clone() for t in tensors]

    def _add(self, stage: int, names: Sequence[str], grads: Sequence[torch.Tensor]) -> None:
        sums = self.sums[stage]
        for name, grad in zip(names, grads, strict=True):
            sums[name] = sums[name] + grad if name in sums else grad.clone()


def stage_at(action: Action, rank: int, ranks: int) -> int:
    """The stage that a pass belongs to: chunk c of rank i is stage c * ranks + i."""
    return action.chunk * ranks + rank


class StageGraphs:
    """The graphs of all stages, bound to the process groups of one mesh: a `Runner`, and the reductions."""

    def __init__(self, program: PipelineProgram, groups: Sequence[str], coordinates: Sequence[Any]) -> None:
        self.coordinates = list(coordinates)
        self._passes = {
            (stage.index, name): fold(bind_groups(getattr(stage, name).graph, groups))
            for stage in program.stages
            for name in ("forward", "backward", "weights", "gather")
            if getattr(stage, name) is not None
        }
        self._reduce = [fold(bind_groups(stage.reduce, groups)) for stage in program.stages]

    def __call__(self, stage: int, _: int, name: str, inputs: list[Any]) -> Sequence[Any]:
        return self._passes[stage, name]([*self.coordinates, *inputs])

    def reduced(self, stage: StageProgram, sums: Values) -> dict[str, torch.Tensor]:
        """A stage's gradients, as parameters are stored, from the sums over micro-batches."""
        names = (*stage.grads_early, *stage.grads_late)
        with torch.no_grad():
            results = self._reduce[stage.index]([*self.coordinates, *(sums[n] for n in names)])
        return dict(zip(names, results, strict=True))


def _split(items: list[torch.Tensor], count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return items[:count], items[count:]
