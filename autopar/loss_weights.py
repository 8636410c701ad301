"""What the loss of each micro-batch counts in that of the batch.

One sample alone is traced to another graph than several are (dims of size one are left out), which no larger batch can
be compared with. Micro-batches of one sample are therefore looked at in pairs of the same sample: twice as many of
everything, which leaves all weights as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from autopar.batch_parts import Call, batch_size, repeated
from autopar.micro_batches import SUM, MicroBatchLoss, Weight, micro_batch_loss
from autopar.trace import Trace

TraceOf = Callable[[Call], Trace]


@dataclass(frozen=True)
class LossWeights:
    """loss: for micro-batches of `copies` times those of `trace`, whose placeholders are in the same order."""

    trace: Trace
    loss: MicroBatchLoss
    copies: int

    def of(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> list[float]:
        """The weights of micro-batches. batches: inputs, and buffers and constants, by placeholder of `trace`."""
        cut = {i.node for i in self.trace.inputs if i.batch_dim == 0}

        def copied(own: str, tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat([tensor] * self.copies) if own in cut and self.copies > 1 else tensor

        return self.loss.weights([{name: copied(own, batch[own]) for name, own in self._taken} for batch in batches])

    @cached_property
    def _taken(self) -> tuple[tuple[str, str], ...]:
        """What counting takes: its placeholder in the trace that counts, and in `trace`."""
        names = zip(_placeholders(self.loss.trace), _placeholders(self.trace), strict=True)
        return tuple((name, own) for name, own in names if name in self.loss.counts_from)


def kind_of_loss(model: nn.Module, traced: Trace, part: Call, micro_batches: int, trace_of: TraceOf) -> Weight:
    """How micro-batches are weighed; TraceError where their losses don't make that of the batch.

    traced: of `part`, one micro-batch.
    """
    if micro_batches == 1:
        return SUM
    copies = _copies(model, part)
    smaller = traced if copies == 1 else trace_of(repeated(model, part, copies))
    return micro_batch_loss(trace_of(repeated(model, part, 2 * copies)), smaller).weight


def loss_weights(model: nn.Module, traced: Trace, part: Call, weight: Weight, trace_of: TraceOf) -> LossWeights:
    """The weights of micro-batches like `part`, whose trace is `traced`."""
    copies = _copies(model, part) if weight.counted is not None else 1
    counted = traced if copies == 1 else trace_of(repeated(model, part, copies))
    return LossWeights(traced, MicroBatchLoss(counted, weight), copies)


def _copies(model: nn.Module, part: Call) -> int:
    return 2 if batch_size(model, part) == 1 else 1


def _placeholders(trace: Trace) -> list[str]:
    return [n.name for n in trace.graph_module.graph.nodes if n.op == "placeholder"]
