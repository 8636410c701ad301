"""Matching a call's arguments with the inputs that a trace was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autopar.errors import PlanMismatch
from autopar.trace import Trace, input_leaves


def bind_inputs(
    trace: Trace, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The call's tensors by placeholder name; raises PlanMismatch where the call differs from what was planned."""
    return bind_leaves(trace, input_leaves(model.forward, args, kwargs))


def bind_leaves(trace: Trace, leaves: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`bind_inputs` for the leaves of a call, by path (`input_leaves`)."""
    for fixed in trace.fixed_inputs:
        if fixed.path not in leaves or not _same(leaves[fixed.path], fixed.value):
            found = leaves.get(fixed.path, "nothing")
            raise PlanMismatch(f"input {fixed.path!r} was {fixed.value!r} when the plan was made, now it is {found!r}")
    bound = {}
    for info in trace.inputs:
        tensor = leaves.get(info.path)
        if not isinstance(tensor, torch.Tensor):
            raise PlanMismatch(f"input {info.path!r} is missing: the plan was made with a tensor {info.shape}")
        if tuple(tensor.shape) != tuple(info.shape) or tensor.dtype != info.dtype:
            raise PlanMismatch(
                f"input {info.path!r} is {tuple(tensor.shape)} {tensor.dtype}, the plan was made for "
                f"{tuple(info.shape)} {info.dtype}; plan again for this shape"
            )
        bound[info.node] = tensor
    return bound


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a is b or a == b)
