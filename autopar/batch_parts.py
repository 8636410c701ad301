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
    """A call's micro-batches: tensors whose dim 0 is that of the first tensor are cut along it, the rest is shared.

    PlanMismatch where the batch does not divide.
    """
    size = batch_size(model, call)
    if size % micro_batches:
        raise PlanMismatch(
            f"the batch of {size} does not divide into {micro_batches} micro-batches; pass a multiple of "
            f"{micro_batches} samples, or plan again"
        )
    rows = size // micro_batches

    def part(index: int) -> Call:
        def cut(leaf: torch.Tensor) -> torch.Tensor:
            whole = leaf.dim() == 0 or leaf.shape[0] != size
            return leaf if whole else leaf[index * rows : (index + 1) * rows]

        found: Call = pytree.tree_map_only(torch.Tensor, cut, call)
        return found

    return [part(index) for index in range(micro_batches)]


def batch_size(model: nn.Module, call: Call) -> int:
    """Dim 0 of the first tensor of a call; PlanMismatch where there is none."""
    leaves = input_leaves(model.forward, *call).values()
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return int(leaf.shape[0])
    raise PlanMismatch("the call has no tensor whose dim 0 is the batch; pass the batch as a tensor")
