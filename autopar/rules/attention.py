"""Rules of the fused attention ops: [batch, head, sequence, head dim] operands.

Batch and heads are independent of each other, so both can be cut; so can the query's
sequence, if the kernel applies no causal mask of its own (it would count positions from
the start of the shard). All sequences cut at once: `autopar.rules.ring`. Grouped queries
stay with their keys, as heads are cut in contiguous runs: query head h reads key head
h // (heads / key heads).
"""

from __future__ import annotations

import torch

from autopar.placements import PARTIAL, REPLICATE, Placement, shard
from autopar.rules.schema import OpCall
from autopar.rules.types import AxisRule

_QUERY = ("query", "out", "grad_out", "logsumexp")
_KEY = ("key", "value")
_MASK = ("attn_mask", "attn_bias")
# logsumexp is [batch, head, sequence] exactly; other kernels pad its sequence.
_EXACT_LOGSUMEXP = frozenset({"aten._scaled_dot_product_flash_attention_for_cpu"})


def mask_cut(mask: torch.Tensor | None, dim: int, like: torch.Tensor) -> Placement:
    """How a mask that broadcasts to [batch, head, query, key] is cut where the scores are cut along `dim`."""
    if mask is None:
        return REPLICATE
    own = dim - (4 - mask.dim())
    return shard(own) if own >= 0 and mask.shape[own] == like.shape[dim] and like.shape[dim] > 1 else REPLICATE


def mask_of(call: OpCall) -> torch.Tensor | None:
    return next((call.tensor(name) for name in _MASK if call.tensor(name) is not None), None)


def _operands(call: OpCall, dim: int) -> dict[str, Placement | None]:
    query = call.tensor("query")
    assert query is not None
    cut: dict[str, Placement | None] = {name: shard(dim) for name in _QUERY}
    if dim < 2:
        cut |= {name: shard(dim) for name in _KEY}
    return cut | {name: mask_cut(mask_of(call), dim, query) for name in _MASK}


def _dims(call: OpCall) -> list[int]:
    query_can_be_cut = call.name.removesuffix("_backward") in _EXACT_LOGSUMEXP and not call.arg("is_causal")
    return [0, 1, 2] if query_can_be_cut else [0, 1]


def attention(call: OpCall) -> list[AxisRule]:
    """-> (out, logsumexp, ...); the rest (random state, offsets) is the same on every rank."""
    rules = []
    for dim in _dims(call):
        made = (shard(dim), shard(dim), *(REPLICATE for _ in call.outputs[2:]))
        rules.append(call.rule(_operands(call, dim), made))
    return rules


def attention_backward(call: OpCall) -> list[AxisRule]:
    """-> (grad_query, grad_key, grad_value[, grad of the mask]); cut queries leave summands for keys and values."""
    rules = []
    for dim in _dims(call):
        key = shard(dim) if dim < 2 else PARTIAL
        made: tuple[Placement, ...] = (shard(dim), key, key)
        if len(call.outputs) > 3:
            query = call.tensor("query")
            assert query is not None
            mask = mask_cut(mask_of(call), dim, query)
            made = (*made, PARTIAL if mask == REPLICATE else mask)
        rules.append(call.rule(_operands(call, dim), made))
    return rules


_KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
ATTENTION = {
    **{f"aten._scaled_dot_product_{kernel}": attention for kernel in _KERNELS},
    **{f"aten._scaled_dot_product_{kernel}_backward": attention_backward for kernel in _KERNELS},
    "autopar.block_attention": attention,
    "autopar.block_attention_backward": attention_backward,
}
