"""A pipeline beside what it must equal: values for one step, cut into micro-batches, and the single device's answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopar._torch_compat import local_parts, local_tensor
from autopar.codegen.stage_types import PipelineProgram
from autopar.compare import cut, glue
from autopar.errors import PlanMismatch
from autopar.micro_batches import micro_batch_loss
from autopar.placements import State, replicated
from autopar.plan_types import Decisions
from autopar.sample import sample_values
from autopar.trace import Trace
from autopar.verification import run_reference

Values = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class StagedCase:
    """A pipeline, a step's values, and the loss and gradients of the single-device model on the whole batch.

    trace: of one micro-batch. batches: values of the placeholders of `trace`, per micro-batch: parameters, buffers and
    constants are the same in all of them. weights: the loss of the step is the sum of the losses of the micro-batches
    by these; they are also what each micro-batch's backward pass starts from, and stand in `batches` as the tangent.
    """

    trace: Trace
    decisions: Decisions
    program: PipelineProgram
    batches: Sequence[Values]
    weights: Sequence[float]
    loss: torch.Tensor
    grads: Values

    @property
    def mesh(self) -> tuple[int, ...]:
        """Of each stage."""
        return self.program.mesh

    @property
    def ranks(self) -> int:
        """Of each stage."""
        return math.prod(self.mesh)

    def scatter(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The local tensors of a placeholder on all ranks of a stage."""
        if not self.mesh:
            return tensor
        params = {p.node: self.decisions.params[p.fqn] for p in self.trace.params}
        state = params.get(name, replicated(len(self.mesh)))
        return local_tensor({r: cut(tensor, state, self.mesh, r).clone() for r in range(self.ranks)})

    def gather(self, tensor: torch.Tensor, state: State) -> torch.Tensor:
        """The whole tensor from its local tensors."""
        parts = local_parts(tensor) if self.mesh else None
        return tensor if parts is None else glue([parts[r] for r in range(self.ranks)], state, self.mesh)

    def start(self) -> tuple[Values, list[Values]]:
        """What all micro-batches share and what each brings, as local tensors."""
        own = {i.node for i in self.trace.inputs} | set(self.trace.tangents)
        shared = {n: self.scatter(n, t) for n, t in self.batches[0].items() if n not in own}
        return shared, [{n: self.scatter(n, batch[n]) for n in own} for batch in self.batches]


def staged_case(
    model: nn.Module,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    whole: Trace,
    traced: Trace,
    decisions: Decisions,
    program: PipelineProgram,
    *,
    seed: int = 0,
    weigh: Callable[[Sequence[Values]], Sequence[float]] | None = None,
) -> StagedCase:
    """Make up values and run the reference.

    whole, traced: the model on the whole batch of `call`, and on the first micro-batch of it (the same, if it is the
        only one).
    weigh: the weights of micro-batches from their values; by default as the two traces say.
    Raises TraceError if the batch cannot be run in micro-batches.
    """
    values = sample_values(whole, model, call, seed)
    expected = run_reference(whole, values)
    count = micro_batches_of(whole, traced)
    batches = [_micro_batch(whole, traced, values, index, count) for index in range(count)]
    if weigh is None:
        weigh = micro_batch_loss(whole, traced).weights if count > 1 else lambda _: [1.0]
    weights = weigh(batches)
    assert whole.loss is not None
    grads = {fqn: expected[node] for fqn, node in whole.grads.items()}
    started = _started(traced, batches, weights)
    return StagedCase(traced, decisions, program, started, weights, expected[whole.loss], grads)


def case_of_batches(
    trace: Trace, decisions: Decisions, program: PipelineProgram, batches: Sequence[Values], weights: Sequence[float]
) -> StagedCase:
    """Any micro-batches by any weights: the single device runs one after the other.

    batches: values of the placeholders of `trace`, but for the tangent.
    """
    started = _started(trace, batches, weights)
    loss, grads = one_after_the_other(trace, started, weights, [{} for _ in batches])
    return StagedCase(trace, decisions, program, started, weights, loss, grads)


def one_after_the_other(
    trace: Trace, batches: Sequence[Values], weights: Sequence[float], drawn: Sequence[Values]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the single device, micro-batch after micro-batch, on given random numbers."""
    assert trace.loss is not None
    losses, grads = [], {fqn: torch.zeros(()) for fqn in trace.grads}
    for values, weight, numbers in zip(batches, weights, drawn, strict=True):
        run = run_reference(trace, values, numbers)
        losses += [run[trace.loss] * weight] if weight else []
        grads = {fqn: grads[fqn] + run[node] for fqn, node in trace.grads.items()}
    return torch.stack(losses).sum(), grads


def _started(trace: Trace, batches: Sequence[Values], weights: Sequence[float]) -> list[Values]:
    """The values with the tangents from which the backward passes start."""
    (tangent,) = trace.tangents
    like = next(n.meta["val"] for n in trace.graph_module.graph.nodes if n.name == tangent)
    return [
        {**values, tangent: torch.full(like.shape, weight, dtype=like.dtype)}
        for values, weight in zip(batches, weights, strict=True)
    ]


def micro_batches_of(whole: Trace, traced: Trace) -> int:
    """How many micro-batches a batch has; PlanMismatch if they don't divide it."""
    small = {i.path: i.shape[0] for i in traced.inputs if i.batch_dim == 0}
    for info in whole.inputs:
        if info.batch_dim == 0 and info.path in small:
            count, rest = divmod(info.shape[0], small[info.path])
            if rest or not count:
                raise PlanMismatch(
                    f"a batch of {info.shape[0]} samples does not divide into micro-batches of {small[info.path]}; "
                    "change the batch or micro_batch"
                )
            return count
    return 1


def _micro_batch(whole: Trace, traced: Trace, values: Values, index: int, count: int) -> dict[str, torch.Tensor]:
    """The values of one micro-batch's placeholders, from those of the whole batch."""
    found = {}
    for (name, shape), (theirs, their_shape) in zip(_shared(whole), _shared(traced), strict=True):
        if shape != their_shape:
            raise PlanMismatch(f"{name} has shape {shape} in the whole batch and {their_shape} in a micro-batch")
        found[theirs] = values[name].clone()
    for info, part in zip(whole.inputs, traced.inputs, strict=True):
        value = values[info.node]
        found[part.node] = value.chunk(count)[index] if info.batch_dim == 0 else value
    return found


def _shared(trace: Trace) -> list[tuple[str, tuple[int, ...]]]:
    """What all micro-batches take: (placeholder, shape)."""
    found = [(p.node, p.shape) for p in trace.params]
    found += [(b.node, b.shape) for b in trace.buffers]
    return found + [(c.node, c.shape) for c in trace.constants]
