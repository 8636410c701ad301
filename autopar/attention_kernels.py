"""torch's fused attention kernels, each device's own, with one signature.

[batch, head, sequence, width], keys and values possibly with fewer heads. The logsumexp is [batch, head, sequence],
float32 for narrower tensors, and -inf where a query sees nothing (kernels of the CPU say 0 there).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

aten = torch.ops.aten


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which parts are summed."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy of it in which the elements of a row (of the last dim) lie side by side: kernels read no other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (out, logsumexp). mask: additive, broadcasts to [batch, head, query, key]."""
    query, key, value = (dense_rows(x) for x in (query, key, value))
    made: tuple[torch.Tensor, torch.Tensor] = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    if mask is None:
        return made
    out, lse = made
    hidden = (mask == -torch.inf).all(-1)
    return out, lse.masked_fill(hidden.expand(lse.shape), -torch.inf)


@dataclass(frozen=True)
class Results:
    """Of the forward pass over all keys, with the gradient of `out`."""

    grad_out: torch.Tensor
    out: torch.Tensor
    logsumexp: torch.Tensor


def backward(
    of: Results,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of query, key, value, of which the keys are some of those that the results are over."""
    query, key, value, out, grad_out = (dense_rows(x) for x in (query, key, value, of.out, of.grad_out))
    made: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, of.logsumexp, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return made
