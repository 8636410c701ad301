"""Ring attention as a rank runs it (`autopar.rules.ring` says when, and what it costs).

Keys and values are one message: glued along the batch. The next part is sent before the present one is computed on.
Gradients of keys and values follow their keys one hop behind, and return home when they have been everywhere. A rank
adds its own to them when it has computed these: until then they are on their way.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx

from autopar.blockwise import ours
from autopar.codegen.exchange import around, dealt_to, even_chunk, odd_chunk, taken_back
from autopar.codegen.shards import LowerContext, Results, Shards, aten
from autopar.rules import AxisRule
from autopar.rules.ring import RING, RING_BACKWARD, comes_dealt, hops, is_dealt_out, window_of

_SEQUENCE = 2


# -- which rank has what ---------------------------------------------------------------------


class Order(Enum):
    """Which chunks a rank works on.

    IN_ORDER: one, by rank. EXCHANGED: one from either end, that of even number first. DEALT: the same, as placements
    have it ("D"): the lower one first.
    """

    IN_ORDER = "in order"
    EXCHANGED = "exchanged"
    DEALT = "dealt"


def starts_of(coord: int, hop: int, parts: int, length: int, order: Order) -> list[int]:
    """Where in the sequence the keys start that have come in `hop` hops: of one chunk, or of two."""
    rank, half = (coord - hop) % parts, length // 2
    if order is Order.IN_ORDER:
        return [rank * length]
    if order is Order.DEALT:
        return [rank * half, (2 * parts - 1 - rank) * half]
    return [even_chunk(rank, parts) * half, odd_chunk(rank, parts) * half]


# -- what both passes share ------------------------------------------------------------------


@dataclass(frozen=True)
class _Ring:
    """One attention on the ring of one axis."""

    op: Shards
    axis: int

    @staticmethod
    def of(op: Shards, lowering: str) -> _Ring:
        """The ring of the axis with this lowering."""
        return _Ring(op, next(axis for axis, rule in enumerate(op.rules) if rule.lowering == lowering))

    @property
    def parts(self) -> int:
        """Ranks of the ring."""
        return self.op.ctx.mesh[self.axis]

    @property
    def hops(self) -> int:
        """How often keys travel."""
        return hops(self.op.traced, self.parts)

    @property
    def order(self) -> Order:
        """See `autopar.rules.ring`."""
        if not is_dealt_out(self.op.traced):
            return Order.IN_ORDER
        dealt = comes_dealt(self.op.rules[self.axis], self.op.slot("key"))
        return Order.DEALT if dealt else Order.EXCHANGED

    def operand(self, name: str) -> fx.Node:
        """A local operand by the name of its argument."""
        return self.op.operands[self.op.slot(name)]

    def starts(self, hop: int) -> fx.Node:
        """The list of starts of what a rank has after some hops."""
        length = self.op.operand_shape(self.op.slot("key"))[_SEQUENCE]
        return self.op.ctx.call(starts_of, self.op.ctx.coord(self.axis), hop, self.parts, length, self.order)

    def places(self, hop: int) -> tuple[object, ...]:
        """The last arguments of a block op."""
        given = self.op.traced
        return (self.starts(0), self.starts(hop), bool(given.arg("is_causal")), window_of(given), given.arg("scale"))

    def mask(self) -> fx.Node | None:
        """The mask, if there is one."""
        given = self.op.arguments().get("attn_mask")
        return given if isinstance(given, fx.Node) else None

    def sent_on(self, x: fx.Node) -> fx.Node:
        """What the rank before has."""
        return self.op.ctx.permute(x, self.axis, around(self.parts))

    def home(self, x: fx.Node) -> fx.Node:
        """Back to the rank whose keys these are, after all hops."""
        return self.op.ctx.permute(x, self.axis, tuple((r - self.hops) % self.parts for r in range(self.parts)))

    def deal(self, x: fx.Node) -> fx.Node:
        """The two chunks of a tensor that this rank works on, in place of the two that it holds."""
        there = (dealt_to(self.parts, odd) for odd in (0, 1))
        return self._exchanged(x, *there) if self.order is Order.EXCHANGED else x

    def undeal(self, x: fx.Node) -> fx.Node:
        """The reverse of `deal`."""
        back = (taken_back(dealt_to(self.parts, odd)) for odd in (0, 1))
        return self._exchanged(x, *back) if self.order is Order.EXCHANGED else x

    def _exchanged(self, x: fx.Node, even: tuple[int, ...], odd: tuple[int, ...]) -> fx.Node:
        call = self.op.ctx.call
        half = self.op.operand_shape(self.op.slot("key"))[_SEQUENCE] // 2
        halves = (call(aten.slice.Tensor, x, _SEQUENCE, at, at + half) for at in (0, half))
        moved = [self.op.ctx.permute(h, self.axis, to) for h, to in zip(halves, (even, odd), strict=True)]
        return call(aten.cat.default, moved, _SEQUENCE)

    def glued(self, key: fx.Node, value: fx.Node) -> fx.Node:
        """Keys and values as one message."""
        return self.op.ctx.call(aten.cat.default, [key, value], 0)

    def parted(self, both: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The views of both."""
        batch = self.op.operand_shape(self.op.slot("key"))[0]
        key, value = (self.op.ctx.call(aten.slice.Tensor, both, 0, at, at + batch) for at in (0, batch))
        return key, value

    def results(self, made: fx.Node, count: int) -> tuple[fx.Node, ...]:
        """The results of a call."""
        return tuple(self.op.ctx.call(operator.getitem, made, index) for index in range(count))

    def cast(self, x: fx.Node, dtype: torch.dtype, source: torch.dtype) -> fx.Node:
        """`x` in a dtype."""
        return x if dtype == source else self.op.ctx.call(aten._to_copy.default, x, dtype=dtype)


# -- lowerings -------------------------------------------------------------------------------


def ring(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """-> (out, logsumexp)."""
    op = Shards(ctx, node, rules, operands)
    of = _Ring.of(op, RING)
    query, mask = of.deal(of.operand("query")), of.mask()
    both = of.deal(of.glued(of.operand("key"), of.operand("value")))
    whole, whole_lse = op.traced.outputs[:2]
    assert whole is not None and whole_lse is not None
    out: fx.Node | None = None
    lse: fx.Node | None = None
    for hop in range(of.hops + 1):
        following = of.sent_on(both) if hop < of.hops else None
        seen = (query, *of.parted(both), mask, *of.places(hop))
        if out is None or lse is None:
            out, lse = of.results(ctx.call(ours.block_attention.default, *seen), 2)
            out = of.cast(out, whole_lse.dtype, whole.dtype) if of.hops else out
        else:
            out, lse = of.results(ctx.call(ours.further_attention.default, out, lse, *seen), 2)
        both = both if following is None else following
    assert out is not None and lse is not None
    out = of.cast(out, whole.dtype, whole_lse.dtype) if of.hops else out
    if mask is not None:  # a query that sees nothing: the kernels say 0
        lse = ctx.call(aten.masked_fill.Scalar, lse, ctx.call(aten.eq.Scalar, lse, -torch.inf), 0.0)
    return (of.undeal(out), of.undeal(lse))


def ring_backward(ctx: LowerContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Results:
    """-> (grad_query, grad_key, grad_value)."""
    op = Shards(ctx, node, rules, operands)
    of = _Ring.of(op, RING_BACKWARD)
    grad_out, query, out, lse = (of.deal(of.operand(n)) for n in ("grad_out", "query", "out", "logsumexp"))
    both = of.deal(of.glued(of.operand("key"), of.operand("value")))
    dtype, wide = op.traced.out.dtype, op.traced.inputs[op.slot("logsumexp")].dtype
    grad_query: fx.Node | None = None
    grad_both: fx.Node | None = None
    for hop in range(of.hops + 1):
        following = of.sent_on(both) if hop < of.hops else None
        carried = None if grad_both is None else of.sent_on(grad_both)
        rest = (out, lse, of.mask(), *of.places(hop))
        if grad_query is None or carried is None:
            seen = (grad_out, query, *of.parted(both), *rest)
            grad_query, *theirs = of.results(ctx.call(ours.block_attention_backward.default, *seen), 3)
            grad_both = of.glued(*theirs)
        else:
            none_yet = ctx.call(aten.zeros_like.default, both, dtype=wide, memory_format=torch.contiguous_format)
            further = (grad_query, none_yet, grad_out, query, both, *rest)
            grad_query, own = of.results(ctx.call(ours.further_attention_backward.default, *further), 2)
            grad_both = ctx.call(aten.add.Tensor, carried, own)
        both = both if following is None else following
    assert grad_query is not None and grad_both is not None
    if of.hops:
        grad_both = of.home(grad_both)
    grads = (grad_query, *of.parted(of.undeal(grad_both)))
    return tuple(of.cast(g, dtype, wide) for g in (of.undeal(grads[0]), *grads[1:]))
