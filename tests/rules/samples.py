"""Small tensors for one-op graphs."""

from __future__ import annotations

import torch

aten = torch.ops.aten
F64, I64 = torch.float64, torch.int64


def randn(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(shape, dtype=F64).to(dtype)


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape)


def mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.5
