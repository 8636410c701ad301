"""The micro-batches of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    rows = _rows(size, micro_batches)
    return [
        _each(call, size, lambda leaf, at=index * rows: leaf[at : at + rows])  # type: ignore[misc]
        for index in range(micro_batches)
    ]


def split_leaves(leaves: Mapping[str, Any], micro_batches: int) -> list[dict[str, Any]]:
    """`split_call` for the leaves of a call, by path (`input_leaves`), which does not take its structure apart again
    for every micro-batch of every step."""
    size = _size(leaves.values())
    rows = _rows(size, micro_batches)

    def part(leaf: Any, index: int) -> Any:
        return leaf[index * rows : (index + 1) * rows] if _is_cut(leaf, size) else leaf

    return [{path: part(leaf, index) for path, leaf in leaves.items()} for index in range(micro_batches)]


def _rows(size: int, micro_batches: int) -> int:
    """Samples of a micro-batch."""
    if size % micro_batches:
        raise PlanMismatch(
            f"the batch of {size} does not divide into {micro_batches} micro-batches; pass a multiple of "
            f"{micro_batches} samples, or plan again"
        )
    return size // micro_batches


def _is_cut(leaf: Any, size: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == size


def repeated(model: nn.Module, call: Call, times: int) -> Call:
    """A call with every sample so many times."""
    return _each(call, batch_size(model, call), lambda leaf: torch.cat([leaf] * times))


def _each(call: Call, size: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """The call with its batches changed: tensors whose dim 0 is that of the first tensor. The rest is shared."""
    found: Call = pytree.tree_map_only(torch.Tensor, lambda leaf: change(leaf) if _is_cut(leaf, size) else leaf, call)
    return found


def batch_size(model: nn.Module, call: Call) -> int:
    """Dim 0 of the first tensor of a call; PlanMismatch where there is none."""
    return _size(input_leaves(model.forward, *call).values())


def _size(leaves: Iterable[Any]) -> int:
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return int(leaf.shape[0])
    raise PlanMismatch("the call has no tensor whose dim 0 is the batch; pass the batch as a tensor")
