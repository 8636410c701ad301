"""Attention with heads of queries cut further than there are heads of keys: ranks share a key head.

Each rank takes from the whole keys the head that its queries read; the gradients of keys are summands.
"""

from __future__ import annotations

from collections.abc import Iterator

from autopar.placements import PARTIAL, Placement, shard
from autopar.rules.attention import mask_cut, mask_of
from autopar.rules.schema import OpCall
from autopar.rules.types import AxisRule

SHARED_HEADS = "shared_heads"
SHARED_HEADS_BACKWARD = "shared_heads_backward"
_FORWARD = frozenset({"aten._scaled_dot_product_flash_attention_for_cpu", "autopar.block_attention"})
_BACKWARD = frozenset(f"{name}_backward" for name in _FORWARD)


def shared_head_rules(call: OpCall, axis_size: int) -> Iterator[AxisRule]:
    """The rule for an axis of more ranks than divide the key heads, if their parts stay within one key head."""
    if call.name not in _FORWARD | _BACKWARD:
        return
    query, key = call.tensor("query"), call.tensor("key")
    assert query is not None and key is not None
    heads, key_heads = int(query.shape[1]), int(key.shape[1])
    if key_heads % axis_size == 0 or heads % axis_size or (heads // key_heads) % (heads // axis_size):
        return
    cut: dict[str, Placement | None] = dict.fromkeys(("query", "out", "grad_out", "logsumexp"), shard(1))
    mask = mask_cut(mask_of(call), 1, query)
    cut |= {"attn_mask": mask}
    if call.name in _BACKWARD:
        yield call.rule(cut, (shard(1), PARTIAL, PARTIAL), SHARED_HEADS_BACKWARD)
    else:
        yield call.rule(cut, shard(1), SHARED_HEADS)
