"""Attention with a mask that says no more than "look back only", or "so far back", becomes attention without a mask.

Models of transformers build their causal mask as a tensor [batch, 1, query, key], from positions that are numbered in
the graph itself. Given to a fused attention op, it costs reading, and the half of the scores that it hides is computed
all the same. Where the mask is causal for sure the op's own causal mode takes its place. Where it is a window (keys at
most so many behind) `autopar::block_attention` does, which computes what is seen. The numbers are the same, up to the
order of sums: what the mask hid had weight 0.

What is known of a mask follows from small tensors that depend on no input (positions, packed-sequence numbers), which
are computed here, and from how comparisons, conjunctions and `where` combine them. So the mask itself is not made: it
has as many elements as there are pairs of tokens. But one that is cut out of ones (`tril`, `triu`) and small is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.blockwise import ours

aten = torch.ops.aten
_MOST_ELEMENTS = 2**25  # of a tensor that is computed here: positions of a batch of samples of a million tokens, say
_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_WINDOWED, _WINDOWED_BACKWARD = ours.block_attention.default, ours.block_attention_backward.default
_DEFAULTS = (None, None, None, 0.0, False)  # of the forward op's arguments: query, key, value, dropout_p, is_causal
_ANDS = (aten.bitwise_and.Tensor, aten.logical_and.default)
_SPREADS = (aten.expand.default, aten.unsqueeze.default, aten.view.default, aten.clone.default)
_POSITIONS = (
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.unsqueeze.default, aten.expand.default,
    aten.slice.Tensor, aten.select.int, aten.view.default, aten.cat.default, aten.sub.Tensor, aten.add.Tensor,
    aten.mul.Tensor, aten.ne.Scalar, aten.ne.Tensor, aten.eq.Scalar, aten.cumsum.default, aten.index.Tensor,
    aten.full.default, aten.zeros.default, aten.ones.default, aten.new_ones.default, aten.scalar_tensor.default,
    aten._to_copy.default, aten.tril.default, aten.triu.default, aten.logical_not.default, aten.bitwise_not.default,
    aten.clone.default,
)  # fmt: skip
_NOTS = (aten.logical_not.default, aten.bitwise_not.default)
_ORS = (aten.bitwise_or.Tensor, aten.logical_or.default)
_INVERSE = {
    aten.le.Tensor: aten.gt.Tensor, aten.gt.Tensor: aten.le.Tensor, aten.lt.Tensor: aten.ge.Tensor,
    aten.ge.Tensor: aten.lt.Tensor,
}  # fmt: skip
_COMPARISONS = (*_INVERSE, aten.eq.Tensor)


@dataclass(frozen=True)
class Mask:
    """What a mask lets through: key k of query q where k <= q + ahead, and q - k < window. None: no such limit."""

    ahead: int | None = None
    window: int | None = None

    def both(self, other: Mask) -> Mask:
        """What both let through."""
        return Mask(*(_least(a, b) for a, b in ((self.ahead, other.ahead), (self.window, other.window))))


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


ALL = Mask()


def use_causal_attention(graph: fx.Graph) -> None:
    """Let fused attention do by itself what its mask says, where that is known; the mask is left without a user."""
    facts = _Facts()
    for node in list(graph.nodes):
        mask = node.kwargs.get("attn_mask") if node.target in (_FORWARD, _BACKWARD) else None
        if not isinstance(mask, fx.Node) or not _has_as_many_keys_as_queries(node):
            continue
        place = 4 if node.target is _FORWARD else 7  # of is_causal among the arguments
        args = (*node.args, *_DEFAULTS[len(node.args) :]) if node.target is _FORWARD else node.args
        seen, keys = facts.mask(mask), mask.meta["val"].shape[-1]
        if args[place] or args[place - 1] or seen is None or seen.ahead != 0:
            continue
        if seen.window is None or seen.window >= keys:
            node.args = (*args[:place], True)
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "attn_mask"}
        elif seen.window > 0:
            node.target = _WINDOWED if node.target is _FORWARD else _WINDOWED_BACKWARD
            node.args = (*args[: place - 1], None, [0], [0], True, seen.window, node.kwargs.get("scale"))
            node.kwargs = {}


def _has_as_many_keys_as_queries(node: fx.Node) -> bool:
    query, key = node.args[:2] if node.target is _FORWARD else node.args[1:3]
    return bool(query.meta["val"].shape[-2] == key.meta["val"].shape[-2])  # type: ignore[union-attr]


class _Facts:
    """What is known of the tensors of one graph."""

    def __init__(self) -> None:
        self.values: dict[fx.Node, torch.Tensor | None] = {}
        self.masks: dict[tuple[fx.Node, bool], Mask | None] = {}

    def value(self, node: Any) -> torch.Tensor | None:
        """The numbers of a small tensor that depends on no input, on the CPU."""
        if node not in self.values:
            self.values[node] = self._value(node)
        return self.values[node]

    def _value(self, node: fx.Node) -> torch.Tensor | None:
        made = node.meta.get("val")
        if node.target not in _POSITIONS or not isinstance(made, torch.Tensor) or made.numel() > _MOST_ELEMENTS:
            return None
        if any(self.value(source) is None for source in node.all_input_nodes):
            return None
        args, kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: self.value(a) if isinstance(a, fx.Node) else a
        )
        kwargs = {name: v for name, v in kwargs.items() if name not in ("device", "pin_memory", "layout")}
        result: torch.Tensor = node.target(*args, **kwargs)
        return result

    def mask(self, node: fx.Node, inverted: bool = False) -> Mask | None:
        """What a mask, or its inverse, lets through, if that is known: True or 0 lets through, False and -inf not."""
        if (node, inverted) not in self.masks:
            self.masks[node, inverted] = self._mask(node, inverted)
        return self.masks[node, inverted]

    def _mask(self, node: fx.Node, inverted: bool) -> Mask | None:
        target, is_bool = node.target, node.meta["val"].dtype == torch.bool
        if target in _SPREADS and _keeps_last_two_dims(node):
            return self.mask(node.args[0], inverted)  # type: ignore[arg-type]
        if target in _NOTS and is_bool:
            return self.mask(node.args[0], not inverted)  # type: ignore[arg-type]
        if (target in (_ORS if inverted else _ANDS) and is_bool) or (target is aten.add.Tensor and _is_sum(node)):
            sides = [self.mask(side, inverted) for side in node.args]  # type: ignore[arg-type]
            left, right = sides
            return None if left is None or right is None else left.both(right)
        if target is aten.where.self and not inverted:
            return self._bias(*node.args)
        if target in _COMPARISONS:
            compared = _INVERSE.get(target) if inverted else target
            return None if compared is None else self._comparison(compared, *node.args)
        known = self.value(node)
        return None if known is None else _of_values(known != inverted if is_bool else known)

    def _bias(self, condition: Any, shown: Any, hidden: Any) -> Mask | None:
        """`where(mask, 0, -inf)`, or the lowest number there is."""
        zero, lowest = self.value(shown), self.value(hidden)
        if zero is None or lowest is None or bool((zero != 0).any()):
            return None
        hides = bool((lowest <= torch.finfo(lowest.dtype).min).all()) if lowest.is_floating_point() else False
        return self.mask(condition) if hides else None

    def _comparison(self, target: Any, left: Any, right: Any) -> Mask | None:
        a, b = self.value(left), self.value(right)
        if a is None or b is None:
            return None
        if target in (aten.ge.Tensor, aten.gt.Tensor):
            a, b, target = b, a, aten.le.Tensor if target is aten.ge.Tensor else aten.lt.Tensor
        low_a, high_a, low_b, high_b = a.min(), a.max(), b.min(), b.max()
        if target is aten.eq.Tensor:
            return ALL if bool((low_a == high_a) & (low_b == high_b) & (low_a == low_b)) else None
        if bool(target(high_a, low_b)):
            return ALL
        strict = int(target is aten.lt.Tensor)
        left, right = _first_of(a), _first_of(b)
        if left is None or right is None or left[0] == right[0]:
            return None
        if left[0] == _KEYS:  # key + left <= query + right
            return Mask(ahead=right[1] - left[1] - strict)
        return Mask(window=right[1] - left[1] + 1 - strict)  # query + left <= key + right


_KEYS, _QUERIES = -1, -2


def _first_of(positions: torch.Tensor) -> tuple[int, int] | None:
    """(dim, n) of a tensor that holds n, n + 1, n + 2, ... along keys or queries and is the same along all else."""
    if positions.dim() < 2 or positions.is_floating_point():
        return None
    first = int(positions.flatten()[0])
    found = [dim for dim in (_KEYS, _QUERIES) if positions.shape[dim] > 1 and _counts(positions - first, dim)]
    return (found[0], first) if len(found) == 1 else None


def _counts(positions: torch.Tensor, dim: int) -> bool:
    """Whether a tensor holds 0, 1, 2, ... along a dim and is the same along all others, the other of the last two 1."""
    if positions.dim() < 2 or positions.shape[-3 - dim] != 1:
        return False
    rows = positions.transpose(dim, -1)
    return bool((rows == torch.arange(positions.shape[dim], dtype=positions.dtype)).all())


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two masks of floating-point numbers."""
    operands = [n.meta["val"] for n in node.args if isinstance(n, fx.Node)]
    return len(operands) == 2 and not node.kwargs and all(v.is_floating_point() and v.dim() > 1 for v in operands)


def _of_values(mask: torch.Tensor) -> Mask | None:
    """What a mask of known numbers lets through: everything, or a band along the diagonal."""
    shown = mask
    if mask.is_floating_point():
        shown = mask == 0
        if not bool((shown | (mask <= torch.finfo(mask.dtype).min)).all()):
            return None
    if shown.dtype != torch.bool or bool(shown.all()):
        return ALL if shown.dtype == torch.bool else None
    if shown.dim() < 2:
        return None
    rows = shown.reshape(-1, *shown.shape[-2:])
    queries, keys = rows.shape[1:]
    first, last = (rows[0, row].nonzero().flatten() for row in (0, -1))
    if not (len(first) and len(last)):
        return None
    ahead, start = int(first[-1]), int(last[0])
    found = Mask(ahead if ahead < keys - 1 else None, queries - start if start else None)
    return found if bool((rows == _band(found, queries, keys)).all()) else None


def _band(mask: Mask, queries: int, keys: int) -> torch.Tensor:
    """[query, key]: what is let through."""
    query, key = torch.arange(queries)[:, None], torch.arange(keys)[None, :]
    shown = torch.ones(queries, keys, dtype=torch.bool)
    if mask.ahead is not None:
        shown &= key <= query + mask.ahead
    return shown if mask.window is None else shown & (query - key < mask.window)


def _keeps_last_two_dims(node: fx.Node) -> bool:
    source = node.args[0].meta["val"]  # type: ignore[union-attr]
    made = node.meta["val"]
    return bool(source.dim() >= 2 and made.dim() >= 2 and source.shape[-2:] == made.shape[-2:])
