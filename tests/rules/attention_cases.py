"""Single attention ops for the soundness test: masks, grouped queries, windows, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

import autopar.blockwise  # noqa: F401  (the ops)
from tests.rules.harness import case

aten, ours = torch.ops.aten, torch.ops.autopar
FUSED = aten._scaled_dot_product_flash_attention_for_cpu.default
FUSED_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _numbers(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def _hidden(*shape: int) -> torch.Tensor:
    """A mask that hides about half, and sees at least the first key."""
    hide = torch.rand(*shape) < 0.5
    hide[..., 0] = False
    return torch.zeros(*shape, dtype=torch.float64).masked_fill(hide, -torch.inf)


def fused(
    queries: tuple[int, ...], keys: tuple[int, ...], *, causal: bool = False, mask: torch.Tensor | None = None
) -> Iterator[fx.Node]:
    """torch's op, and its backward op."""
    q, k, v = _numbers(*queries), _numbers(*keys), _numbers(*keys)
    yield case(FUSED, q, k, v, 0.0, causal, attn_mask=mask)
    out, lse = FUSED(q, k, v, 0.0, causal, attn_mask=mask)
    yield case(FUSED_BACKWARD, _numbers(*queries), q, k, v, out, lse, 0.0, causal, attn_mask=mask)


def attention() -> Iterator[fx.Node]:
    """Every kind of mask."""
    shape = (4, 4, 8, 4)
    for mask in (None, _numbers(4, 4, 8, 8), _numbers(4, 1, 8, 8), _numbers(1, 1, 8, 8), _numbers(8, 8)):
        yield from fused(shape, shape, mask=mask)
    yield from fused(shape, shape, causal=True)


def long_attention() -> Iterator[fx.Node]:
    """What a ring does: grouped queries, masks of keys and of pairs, queries that see nothing, queries without keys."""
    queries, keys = (2, 4, 16, 4), (2, 2, 16, 4)
    padding = _hidden(2, 1, 1, 16)
    nothing = padding.clone()
    nothing[1] = -torch.inf
    for mask in (None, padding, nothing, _hidden(2, 1, 16, 16), _hidden(16, 16)):
        yield from fused(queries, keys, mask=mask)
    yield from fused(queries, keys, causal=True)
    yield from fused(queries, (2, 2, 8, 4))
    for heads in (1, 2):  # of keys, for 8 of queries
        yield from fused((1, 8, 4, 4), (1, heads, 4, 4), mask=_hidden(1, 8, 4, 4))


def windows() -> Iterator[fx.Node]:
    """Attention that looks back a fixed way: shorter than a rank's part, longer, and as long as all."""
    for window in (1, 3, 4, 9, 16):
        q, k, v = _numbers(2, 4, 16, 4), _numbers(2, 2, 16, 4), _numbers(2, 2, 16, 4)
        places = (None, [0], [0], True, window, 0.5)
        yield case(ours.block_attention.default, q, k, v, *places)
        out, lse = ours.block_attention(q, k, v, *places)
        yield case(ours.block_attention_backward.default, _numbers(2, 4, 16, 4), q, k, v, out, lse, *places)


ATTENTION_GROUPS = {"attention": attention, "long_attention": long_attention, "windows": windows}
