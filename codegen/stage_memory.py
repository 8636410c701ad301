"""Simulates the memory of the stages that one pipeline rank runs, tensor by tensor, by the steps that it executes.

As `codegen/memory.py` for a program without stages: a storage lives from the op that makes it to the last use of any
variable that refers to it. Between the passes of a micro-batch its values are held by name; what was received is there
from the moment the receive was posted, what was sent until the step ends (torch waits for sends then), gradients from
the first micro-batch on. What is there at all times (parameters, optimizer state, buffers, the batch) is not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from autopar.codegen.emit import Version
from autopar.codegen.stage_types import (
    Message,
    StagePass,
    StageProgram,
    gradient_dtypes,
    own_gradients,
    wider,
)
from autopar.codegen.storages import last_uses, storages_of
from autopar.simulating.replay import RECEIVE_BACKWARD, RECEIVE_FORWARD, SEND_BACKWARD, SEND_FORWARD, Step
from autopar.simulating.schedules import BACKWARD, FORWARD, INPUTS, WEIGHTS


@dataclass(eq=False, frozen=True)
class Block:
    """A storage of so many bytes."""

    nbytes: int


@dataclass
class _Heap:
    """The blocks that somebody refers to."""

    references: Counter[Block] = field(default_factory=Counter)
    alive_bytes: int = 0
    peak_bytes: int = 0

    def hold(self, block: Block | None) -> None:
        """One more reference. None: a block that is there at all times."""
        if block is not None:
            self.alive_bytes += 0 if self.references[block] else block.nbytes
            self.references[block] += 1
            self.peak_bytes = max(self.peak_bytes, self.alive_bytes)

    def drop(self, block: Block | None) -> None:
        """One reference less."""
        if block is not None:
            self.references[block] -= 1
            if not self.references[block]:
                del self.references[block]
                self.alive_bytes -= block.nbytes


class _Graph:
    """A graph that is run many times."""

    def __init__(self, graph: fx.Graph, axes: int) -> None:
        self.order = [n for n in graph.nodes if n.op != "output"]
        self.inputs = [next(iter(storages_of(n.meta["val"]))) for n in graph.find_nodes(op="placeholder")[axes:]]
        results = list(graph.output_node().args[0])  # type: ignore[arg-type]
        self.results = [next(iter(storages_of(n.meta["val"]).items())) for n in results if isinstance(n, fx.Node)]
        self.ends: dict[int, list[int]] = {}
        for storage, time in last_uses(self.order).items():
            self.ends.setdefault(time, []).append(storage)
        self.made = [storages_of(n.meta.get("val")) if n.op == "call_function" else {} for n in self.order]

    def run(self, heap: _Heap, inputs: Sequence[Block | None]) -> list[Block | None]:
        """Results, each held once for the caller. inputs: held once each, and let go of here."""
        of: dict[int, Block | None] = {}
        for storage, block in zip(self.inputs, inputs, strict=True):
            if storage in of:  # two views of one
                heap.drop(block)
            else:
                of[storage] = block
        held, kept = set(of), {storage for storage, _ in self.results}
        for time, made in enumerate(self.made):
            for storage, nbytes in made.items():
                if storage not in of:
                    of[storage] = Block(nbytes)
                    heap.hold(of[storage])
                    held.add(storage)
            for storage in self.ends.get(time, ()):
                if storage in held and storage not in kept:
                    heap.drop(of[storage])
                    held.discard(storage)
        found = [of[storage] for storage, _ in self.results]
        for block in found:
            heap.hold(block)
        for storage in held:
            heap.drop(of[storage])
        return found


class _StageMemory:
    """One stage, as `autopar.runtime.stage.Stage` runs it."""

    def __init__(self, program: StageProgram, heap: _Heap, sum_dtype: torch.dtype | None) -> None:
        self.program, self.heap = program, heap
        axes = len(program.mesh)
        self.forward, self.backward, self.weights = (
            (one.inputs, _Graph(one.graph, axes)) for one in (program.forward, program.backward, program.weights)
        )
        self.reduce = _Graph(program.reduce, axes)
        self.for_weights = frozenset(program.weights.inputs)
        self.after_forward = self.for_weights | frozenset(program.backward.inputs)
        self.flying: dict[int, dict[Version, Block | None]] = {}
        self.sends: dict[int, list[Block | None]] = {}
        self.sent: list[Block | None] = []  # held until all passes have run
        self.sums: dict[str, Block | None] = {}
        self.mine: set[str] = set()
        self.own = own_gradients(program)
        summed = program.reduce.find_nodes(op="placeholder")[axes:]
        names = (*program.grads_early, *program.grads_late)
        dtypes = {name: wider(dtype, sum_dtype) for name, dtype in gradient_dtypes(program).items()}
        tensors = [node.meta["val"] for node in summed]
        self.sizes = {n: t.numel() * dtypes[n].itemsize for n, t in zip(names, tensors, strict=True)}
        self.widened = {n for n, t in zip(names, tensors, strict=True) if t.dtype != dtypes[n]}
        self.gathered: dict[Version, Block | None] = {}
        if program.gather is not None:
            self._gather(program.gather)

    def _gather(self, one: StagePass) -> None:
        made = _Graph(one.graph, len(self.program.mesh)).run(self.heap, [None] * len(one.inputs))
        self.gathered = dict(zip(self.program.gathered, made, strict=True))

    def step(self, step: Step) -> None:
        """Do one step."""
        program, at = self.program, step.micro_batch
        if step.kind == RECEIVE_FORWARD:
            self._receive(program.receives_forward, at)
        elif step.kind == RECEIVE_BACKWARD:
            self._receive(program.receives_backward, at)
        elif step.kind in (SEND_FORWARD, SEND_BACKWARD):
            self.sent += self.sends.pop(at)
        elif step.kind == FORWARD:
            results = self._run(self.forward, at, self.after_forward)
            sent, outputs = len(program.sends_forward.values), len(program.outputs)
            self.sends[at] = results[:sent]
            self._keep(at, program.saved_forward, results[sent + outputs :])
        elif step.kind in (BACKWARD, INPUTS):
            results = self._run(self.backward, at, self.for_weights)
            sent, early = len(program.sends_backward.values), len(program.grads_early)
            self.sends[at] = results[:sent]
            self._keep(at, program.saved_backward, results[sent + early :])
            self._add(program.grads_early, results[sent : sent + early])
        if step.kind in (BACKWARD, WEIGHTS):
            self._add(program.grads_late, self._run(self.weights, at, frozenset()))
            del self.flying[at]

    def sends_done(self) -> None:
        """What was sent is let go."""
        for block in self.sent:
            self.heap.drop(block)
        self.sent.clear()

    def finish(self) -> None:
        """Reduce the gradients; they stay."""
        summed = [self.sums.pop(name) for name in (*self.program.grads_early, *self.program.grads_late)]
        for block in self.gathered.values():
            self.heap.drop(block)
        self.gathered = {}
        self.reduce.run(self.heap, summed)

    def _keep(self, at: int, versions: Sequence[Version], blocks: Sequence[Block | None]) -> None:
        """Leave results to later passes; what was received may be among them, under the name that it has already."""
        flying = self.flying[at]
        for version, block in zip(versions, blocks, strict=True):
            self.heap.drop(flying.get(version))
            flying[version] = block

    def _receive(self, message: Message, at: int) -> None:
        flying = self.flying.setdefault(at, {})
        for version, tensor in zip(message.values, message.tensors, strict=True):
            flying[version] = Block(tensor.nbytes)
            self.heap.hold(flying[version])

    def _run(self, one: tuple[tuple[Version, ...], _Graph], at: int, keep: frozenset[Version]) -> list[Block | None]:
        taken, graph = one
        flying = self.flying.setdefault(at, {})
        inputs = [flying.get(version, self.gathered.get(version)) for version in taken]
        for block in inputs:  # until their last use in the graph
            self.heap.hold(block)
        for version in [v for v in flying if v not in keep]:
            self.heap.drop(flying.pop(version))
        return graph.run(self.heap, inputs)

    def _add(self, names: Sequence[str], grads: Sequence[Block | None]) -> None:
        for name, grad in zip(names, grads, strict=True):
            if name not in self.sums:
                self.sums[name] = Block(self.sizes[name]) if name in self.widened else grad
                self.heap.hold(self.sums[name])
                if name in self.own | self.widened:
                    self.mine.add(name)
            elif name not in self.mine:
                made = Block(self.sizes[name])
                self.heap.hold(made)
                self.heap.drop(self.sums[name])
                self.sums[name] = made
                self.mine.add(name)
        for grad in grads:
            self.heap.drop(grad)


def peak_of_passes(stages: Iterable[StageProgram], steps: Sequence[Step], sum_dtype: torch.dtype | None = None) -> int:
    """Most bytes that the passes of a step hold at once on a pipeline rank, on top of what is there at all times.

    stages: of the rank. steps: that it executes. sum_dtype: of sums of gradients where it is wider than theirs.
    """
    heap = _Heap()
    mine: Mapping[int, _StageMemory] = {stage.index: _StageMemory(stage, heap, sum_dtype) for stage in stages}
    for step in steps:
        mine[step.stage].step(step)
    for stage in mine.values():
        stage.sends_done()
    for stage in mine.values():
        stage.finish()
    return heap.peak_bytes
