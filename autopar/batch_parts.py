"""The micro-batches of a call."""

from __future__ import annotations

from collections.abc import Callable
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
    return [
        _each(call, size, lambda leaf, at=index * rows: leaf[at : at + rows])  # type: ignore[misc]
        for index in range(micro_batches)
    ]


def repeated(model: nn.Module, call: Call, times: int) -> Call:
    """A call with every sample so many times."""
    return _each(call, batch_size(model, call), lambda leaf: torch.cat([leaf] * times))


def _each(call: Call, size: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """The call with its batches changed: tensors whose dim 0 is that of the first tensor. The rest is shared."""
    found: Call = pytree.tree_map_only(
        torch.Tensor, lambda leaf: change(leaf) if leaf.dim() and leaf.shape[0] == size else leaf, call
    )
    return found


def batch_size(model: nn.Module, call: Call) -> int:
    """Dim 0 of the first tensor of a call; PlanMismatch where there is none."""
    leaves = input_leaves(model.forward, *call).values()
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return int(leaf.shape[0])
    raise PlanMismatch("the call has no tensor whose dim 0 is the batch; pass the batch as a tensor")
