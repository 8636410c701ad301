"""The norm of all gradients, also where no rank has all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def clip_grad_norm(
    params: Iterable[nn.Parameter], max_norm: float, norm_type: float, pipeline: dist.ProcessGroup | None
) -> torch.Tensor:
    """Scale gradients so that their norm is at most `max_norm`; the norm before.

    pipeline: ranks that each have the gradients of other parameters; None where every rank has a part of all.
    """
    params = list(params)
    held = [p for p in params if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in held if p.grad is not None], norm_type)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if pipeline is not None:
        norm = _over_stages(norm.to(params[0].device), norm_type, pipeline).to(norm.dtype)
    nn.utils.clip_grads_with_norm_(held, max_norm, norm)
    return norm


def _over_stages(norm: torch.Tensor, norm_type: float, pipeline: dist.ProcessGroup) -> torch.Tensor:
    """The norm of everything, from those of the stages; of one dtype, also where a stage has no gradients."""
    if math.isinf(norm_type):
        found = norm.double()
        dist.all_reduce(found, dist.ReduceOp.MAX, group=pipeline)
        return found
    powers = norm.double() ** norm_type
    dist.all_reduce(powers, group=pipeline)
    return powers ** (1 / norm_type)
