"""The micro-batches of a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autopar._torch_compat import pytree
from autopar.errors import PlanMismatch
from autopar.trace import input_leaves

Call = tuple[tuple[Any, ...], dict[str, Any]]


def split_call(model: nn.Module, call: Call, micro_batches: int) -> list[Call]:
    """A call's micro-batches; PlanMismatch where the batch does not divide."""
    size = batch_size(model, call)
    if size % micro_batches:
        raise PlanMismatch(
            f"the batch of {size} does not divide into {micro_batches} micro-batches; pass a multiple of "
            f"{micro_batches} samples, or plan again"
        )
    rows = size // micro_batches
    return [samples(model, call, index * rows, (index + 1) * rows) for index in range(micro_batches)]


def samples(model: nn.Module, call: Call, start: int, stop: int) -> Call:
    """A call with some of the samples: tensors whose dim 0 is that of the first tensor are cut, the rest is shared."""
    size = batch_size(model, call)

    def cut(leaf: torch.Tensor) -> torch.Tensor:
        return leaf[start:stop] if leaf.dim() and leaf.shape[0] == size else leaf

    found: Call = pytree.tree_map_only(torch.Tensor, cut, call)
    return found


def batch_size(model: nn.Module, call: Call) -> int:
    """Dim 0 of the first tensor of a call; PlanMismatch where there is none."""
    leaves = input_leaves(model.forward, *call).values()
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return int(leaf.shape[0])
    raise PlanMismatch("the call has no tensor whose dim 0 is the batch; pass the batch as a tensor")
