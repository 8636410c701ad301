"""Attention whose values have fewer numbers a head than its queries, as in DeepSeek's latent attention.

Torch's fused kernel on a CPU wants as many of both, and without it every score is written out. Zeros beside the values
only add columns of zeros to the result, which are dropped: the function is the same, at the price of their products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

_DROPOUT = 4  # its place among the arguments: query, key, value, mask, dropout


def widened(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """What computes the same as `target` of these arguments: itself, or attention with wider values."""
    if target is not scaled_dot_product_attention or len(args) < 3:
        return target
    dropout = args[_DROPOUT] if len(args) > _DROPOUT else kwargs.get("dropout_p", 0.0)
    lacking = args[0].shape[-1] - args[2].shape[-1]
    return _with_wider_values if lacking > 0 and dropout == 0 else target


def _with_wider_values(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any) -> Any:
    width = value.shape[-1]
    wide = pad(value, (0, query.shape[-1] - width))
    return scaled_dot_product_attention(query, key, wide, *rest, **named)[..., :width]
