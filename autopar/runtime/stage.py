"""One pipeline stage on this rank: what torch's schedule runtime asks of a stage, with emitted graphs behind it.

A pass takes its inputs by version (a value in a state) from what arrived, what earlier passes of the same micro-batch
left, and what the step brought: parameters, buffers, inputs, tangents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import fx

from autopar.codegen.emit import Version
from autopar.codegen.fold import fold
from autopar.codegen.stage_types import Message, StagePass, StageProgram, gradient_dtypes, own_gradients, wider
from autopar.runtime.execute import bind_groups
from autopar.simulating.schedules import FORWARD, INPUTS, WEIGHTS

Values = Mapping[str, torch.Tensor]


@dataclass
class StepValues:
    """What a step brings to the stages of a rank, by placeholder of the joint graph.

    shared: parameters, buffers, constants: local tensors. batches: inputs and tangents, per micro-batch.
    """

    shared: Values
    batches: Sequence[Values]

    def take(self, micro_batch: int, name: str) -> torch.Tensor:
        """The value of a placeholder for a micro-batch."""
        batch = self.batches[micro_batch]
        return batch[name] if name in batch else self.shared[name]


Flying = dict[Version, torch.Tensor]  # what one micro-batch has on a stage between its passes


class Stage:
    """The executable form of a `StageProgram` on one rank, with the methods that torch's runtime calls.

    stages: how many the pipeline has. group: the ranks of the same coordinates in all stages. group_names,
    coordinates: of the stage's mesh, as of `RankProgram`. sum_dtype: in which gradients are added up over micro-batches
    and ranks where it is wider than theirs; they are rounded once, when the step ends. passes: by kind.
    """

    submod = None  # torch asks whether it is an FSDP module

    def __init__(
        self,
        program: StageProgram,
        stages: int,
        group: dist.ProcessGroup,
        group_names: Sequence[str],
        coordinates: Sequence[int],
        device: torch.device,
        sum_dtype: torch.dtype | None = None,
    ) -> None:
        self.program, self.device, self.sum_dtype = program, device, sum_dtype
        self.stage_index, self.num_stages = program.index, stages
        self.is_first, self.is_last = program.index == 0, program.index == stages - 1
        self.group, self.group_rank, self.group_size = group, dist.get_rank(group), dist.get_world_size(group)
        self.stage_index_to_group_rank: dict[int, int] = {}  # set by the schedule
        self._coordinates = list(coordinates)
        graphs = {FORWARD: program.forward, INPUTS: program.backward, WEIGHTS: program.weights}
        self.passes = {kind: BoundPass(one, group_names) for kind, one in graphs.items()}
        self._gather = None if program.gather is None else BoundPass(program.gather, group_names)
        self._gathered: Flying = {}
        self._reduce = _executable(program.reduce, group_names)
        self._for_weights = frozenset(program.weights.inputs)
        self._after_forward = self._for_weights | frozenset(program.backward.inputs)
        self.values = StepValues({}, ())
        self._flying: dict[int, Flying] = {}
        self._sends: dict[int, list[torch.Tensor]] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._own = own_gradients(program)
        self._dtypes = gradient_dtypes(program)
        self._mine: set[str] = set()  # sums that share their memory with nothing
        self.outputs: list[list[torch.Tensor]] = []  # of each micro-batch, in the order of `program.outputs`
        self._backward_follows = True

    def begin(self, values: StepValues, *, backward_follows: bool = True) -> None:
        """Forget the last step; the next one takes these values, and keeps what its backward passes take, if any."""
        self.values, self._backward_follows = values, backward_follows
        self.outputs = [[] for _ in values.batches]
        self._flying.clear()
        self._sends.clear()
        self._sums.clear()
        self._mine.clear()
        if self._gather is not None:
            stored = [values.shared[name] for name, _ in self._gather.inputs]
            self._gathered = dict(
                zip(self.program.gathered, self._gather.run([*self._coordinates, *stored]), strict=True)
            )

    def finish(self) -> dict[str, torch.Tensor]:
        """The gradients of the step, by parameter, as the parameters are stored."""
        names = (*self.program.grads_early, *self.program.grads_late)
        self.end()
        reduced = self._reduce([*self._coordinates, *(self._sums.pop(name) for name in names)])
        return {name: grad.to(self._dtypes[name]) for name, grad in zip(names, reduced, strict=True)}

    def end(self) -> None:
        """Let go of what the step brought."""
        self.values = StepValues({}, ())
        self._gathered = {}

    # -- passes: called by torch's runtime ---------------------------------------------

    def forward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        """The forward pass of a micro-batch, whose message has arrived."""
        flying = self._flying.setdefault(micro_batch, {})
        results = self._run(
            self.passes[FORWARD], micro_batch, keep=self._after_forward if self._backward_follows else frozenset()
        )
        self._sends[micro_batch], rest = _split(results, len(self.program.sends_forward.values))
        self.outputs[micro_batch], saved = _split(rest, len(self.program.outputs))
        if self._backward_follows:
            flying.update(zip(self.program.saved_forward, saved, strict=True))

    def backward_one_chunk(self, micro_batch: int, *, full_backward: bool, **_: Any) -> None:
        """What the stage before waits for, and with `full_backward` the rest as well."""
        self._backward_part(micro_batch)
        if full_backward:
            self.backward_weight_one_chunk(micro_batch)

    def _backward_part(self, micro_batch: int) -> None:
        results = self._run(self.passes[INPUTS], micro_batch, keep=self._for_weights)
        self._sends[micro_batch], rest = _split(results, len(self.program.sends_backward.values))
        early, saved = _split(rest, len(self.program.grads_early))
        self._flying[micro_batch].update(zip(self.program.saved_backward, saved, strict=True))
        self._add(self.program.grads_early, early)

    def backward_weight_one_chunk(self, micro_batch: int, **_: Any) -> None:
        """The gradients that nobody waits for."""
        self._add(self.program.grads_late, self._run(self.passes[WEIGHTS], micro_batch, keep=frozenset()))
        del self._flying[micro_batch]

    def _run(self, graph: BoundPass, micro_batch: int, keep: frozenset[Version]) -> list[torch.Tensor]:
        """One pass. keep: versions that a later pass of the micro-batch takes again; others are let go with it."""
        flying = self._flying[micro_batch]
        inputs: list[Any] = list(self._coordinates)
        for version in graph.inputs:
            if version in flying or version in self._gathered:
                inputs.append(flying[version] if version in flying else self._gathered[version])
            else:
                inputs.append(self.values.take(micro_batch, version[0]))
        for version in [v for v in flying if v not in keep]:
            del flying[version]
        return list(graph.run(inputs))

    def _add(self, names: Sequence[str], grads: Sequence[torch.Tensor]) -> None:
        """Add the gradients of a micro-batch: into the first one's memory, unless that is another tensor's as well."""
        for name, grad in zip(names, grads, strict=True):
            if name not in self._sums:
                wide = wider(grad.dtype, self.sum_dtype)
                self._sums[name] = grad.to(wide)
                if name in self._own or wide != grad.dtype:
                    self._mine.add(name)
            elif name in self._mine:
                self._sums[name].add_(grad)
            else:
                self._sums[name] = self._sums[name] + grad
                self._mine.add(name)

    # -- messages: called by torch's runtime ------------------------------------------------

    def get_fwd_recv_ops(self, micro_batch: int) -> list[dist.P2POp]:
        """Receives of what the stage before sends; the passes find it where earlier passes leave their values."""
        return self._receive(self.program.receives_forward, micro_batch, self.stage_index - 1)

    def get_bwd_recv_ops(self, micro_batch: int) -> list[dist.P2POp]:
        """Receives of what the stage behind sends."""
        return self._receive(self.program.receives_backward, micro_batch, self.stage_index + 1)

    def get_fwd_send_ops(self, micro_batch: int) -> list[dist.P2POp]:
        """Sends of the forward pass that has just run."""
        return self._send(micro_batch, self.stage_index + 1)

    def get_bwd_send_ops(self, micro_batch: int) -> list[dist.P2POp]:
        """Sends of the backward pass that has just run."""
        return self._send(micro_batch, self.stage_index - 1)

    def _receive(self, message: Message, micro_batch: int, source: int) -> list[dist.P2POp]:
        flying = self._flying.setdefault(micro_batch, {})
        ops = []
        for version, like in zip(message.values, message.tensors, strict=True):
            buffer = torch.empty(tuple(like.shape), dtype=like.dtype, device=self.device)
            flying[version] = buffer
            ops.append(self._op(dist.irecv, buffer, source))
        return ops

    def _send(self, micro_batch: int, target: int) -> list[dist.P2POp]:
        sends = self._sends.pop(micro_batch)
        return [self._op(dist.isend, tensor.detach().contiguous(), target) for tensor in sends]

    def _op(self, kind: Callable[..., Any], tensor: torch.Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self.group, group_peer=self.stage_index_to_group_rank[stage])

    def perform_reduce_grad(self, _: int) -> None:
        """Nothing: `finish` reduces, when all stages have ended."""


class BoundPass:
    """A stage pass, bound to process groups. run: on its inputs, in a list that it empties."""

    def __init__(self, one: StagePass, group_names: Sequence[str]) -> None:
        self.inputs = one.inputs
        self.run = _executable(one.graph, group_names)


def _executable(graph: fx.Graph, group_names: Sequence[str]) -> Callable[[list[Any]], Sequence[Any]]:
    return fold(bind_groups(graph, group_names))


def _split(items: list[torch.Tensor], count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return items[:count], items[count:]
