"""Ring attention on one mesh axis: all of query, key, value and result cut along the sequence.

Liu, Zaharia, Abbeel, "Ring attention with blockwise transformers for near-infinite context" (2023). Keys and values
travel around the axis, size - 1 hops; in the backward pass their gradients travel with them, and one hop more, home.
Grouped keys travel as they are.

A causal sequence is dealt out: of 2 x size chunks, rank i gets the i-th and the i-th from the end, so that all ranks
have the same work at every hop ("zigzag", as in Llama 3, Grattafiori et al. 2024, section 3.3.2). Where it lies so
already (`autopar.dealing`), nothing but keys and values moves. Else halves of all operands and results are exchanged
before and after. With a window, which looks back a fixed way, and where all see all,
ranks have the same work as they are, and keys travel only as far as the window reaches.

The sums run over torch's fused kernels (`autopar.blockwise`). Not offered: dropout, whose numbers depend on the place
in the whole, and masks that are causal as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from autopar.attention_kernels import wide
from autopar.placements import REPLICATE, Placement, dealt, is_dealt, shard
from autopar.rules.schema import OpCall
from autopar.rules.types import AxisRule, InnerCollective

RING = "ring"
RING_BACKWARD = "ring_backward"
ONE_AXIS = frozenset({RING, RING_BACKWARD})  # a message goes along one axis: no ring runs around two
_SEQUENCE = 2
_FORWARD = frozenset({"aten._scaled_dot_product_flash_attention_for_cpu", "autopar.block_attention"})
_BACKWARD = frozenset(f"{name}_backward" for name in _FORWARD)


def window_of(call: OpCall) -> int:
    """How many keys a query sees at most, itself included; 0 if there is no such limit."""
    return int(call.arg("window", 0))


def is_dealt_out(call: OpCall) -> bool:
    """Whether ranks work on two chunks each, one from either end (see the module)."""
    return bool(call.arg("is_causal")) and not window_of(call)


def can_be_dealt(call: OpCall, length: int) -> bool:
    """Whether an op is attention that has a ring of dealt sequences of this length."""
    return call.name in _FORWARD and is_dealt_out(call) and _has_ring(call) and _length(call) == length


def hops(call: OpCall, axis_size: int) -> int:
    """How often keys and values are sent on."""
    key = call.tensor("key")
    assert key is not None
    own = max(1, int(key.shape[_SEQUENCE]) // axis_size)
    window = window_of(call)
    return min(axis_size - 1, -(-(window - 1) // own)) if window else axis_size - 1


def ring_rules(call: OpCall, axis_size: int) -> Iterator[AxisRule]:
    """The one rule of a ring on an axis of this size, where there is one."""
    if call.name not in _FORWARD | _BACKWARD or axis_size == 1:
        return
    if not _has_ring(call):
        return
    length = _length(call)
    units = length // 2 if is_dealt_out(call) and length % 2 == 0 else 0
    if is_dealt_out(call) and not units:
        return
    moved = [*_around(call, axis_size), *(_exchanges(call) if is_dealt_out(call) else ())]
    yield _rule(call, shard(_SEQUENCE), moved, units)


def dealt_ring(call: OpCall, axis_size: int) -> Iterator[AxisRule]:
    """The ring of a causal sequence that is dealt out already."""
    if call.name in _FORWARD | _BACKWARD and axis_size > 1 and _has_ring(call) and is_dealt_out(call):
        yield _rule(call, dealt(_SEQUENCE), list(_around(call, axis_size)), 0)


def comes_dealt(rule: AxisRule, slot: int) -> bool:
    """Whether an operand of a ring is dealt out already."""
    return is_dealt(rule.inputs[slot])


def _rule(call: OpCall, cut: Placement, moved: list[InnerCollective], units: int) -> AxisRule:
    taken: dict[str, Placement | None] = dict.fromkeys(("query", "key", "value", "out", "grad_out", "logsumexp"), cut)
    taken["attn_mask"] = _mask_cut(call.tensor("attn_mask"), _length(call))
    name = RING_BACKWARD if call.name in _BACKWARD else RING
    return call.rule(taken, cut, name, collectives=tuple(moved), units=units)


def _length(call: OpCall) -> int:
    query = call.tensor("query")
    assert query is not None
    return int(query.shape[_SEQUENCE])


def _has_ring(call: OpCall) -> bool:
    key, mask, length = call.tensor("key"), call.tensor("attn_mask"), _length(call)
    assert key is not None
    if call.arg("dropout_p", 0.0) or length != int(key.shape[_SEQUENCE]) or not _is_whole(call):
        return False
    return mask is None or not (call.arg("is_causal") or int(mask.shape[-1]) != length)


def _is_whole(call: OpCall) -> bool:
    """Whether the op is of a whole sequence: `autopar::block_attention` may be of a part."""
    starts = [list(call.arg(name, [0])) for name in ("query_starts", "key_starts")]
    return starts == [[0], [0]]


def _mask_cut(mask: torch.Tensor | None, length: int) -> Placement:
    """Rows of a mask are cut with the queries. Its columns are whole, each block takes its own."""
    if mask is None or mask.dim() < 2 or int(mask.shape[-2]) != length or length == 1:
        return REPLICATE
    return shard(mask.dim() - 2)


def _around(call: OpCall, axis_size: int) -> Iterator[InnerCollective]:
    """What goes around, and the copies of it."""
    return _backward_moves(call, axis_size) if call.name in _BACKWARD else _forward_moves(call, axis_size)


def _exchanges(call: OpCall) -> Iterator[InnerCollective]:
    """Halves of operands and results, before and after."""
    query, key = (("in", call.slots[name][0]) for name in ("query", "key"))
    moved: tuple[tuple[tuple[str, int], float], ...] = ((query, 1), (key, 2), (("out", 0), 1), (("out", 1), 1))
    if call.name in _BACKWARD:
        moved = ((query, 3), (key, 2), (("in", call.slots["logsumexp"][0]), 1), (query, 1), (key, 2))
    for tensor, copies in moved:
        yield InnerCollective("permute", tensor, copies=copies / 2, times=2)


def _forward_moves(call: OpCall, axis_size: int) -> Iterator[InnerCollective]:
    key = ("in", call.slots["key"][0])
    count = hops(call, axis_size)
    yield InnerCollective("permute", key, copies=2, times=count, beside_compute=True)
    yield InnerCollective("copy", ("out", 0), copies=1.5, times=count)  # the sum of two results: reads two, writes one


def _backward_moves(call: OpCall, axis_size: int) -> Iterator[InnerCollective]:
    query, key = (("in", call.slots[name][0]) for name in ("query", "key"))
    dtype = call.inputs[call.slots["key"][0]].dtype
    wider = wide(dtype).itemsize / dtype.itemsize  # gradients are summed, and travel, in the wide dtype
    count = hops(call, axis_size)
    yield InnerCollective("permute", key, copies=2, times=count, beside_compute=True)
    if count:
        yield InnerCollective("permute", key, copies=2 * wider, times=count, beside_compute=True)
        yield InnerCollective("permute", key, copies=2 * wider)
    yield InnerCollective("copy", query, copies=1.5 * wider, times=count)
