"""Random numbers of a rank that holds a part of a tensor.

An op that runs whole draws from the default generator: as one device would, the same on
every rank. Where its result is cut, the op `autopar::draw` draws the part: one number from
the default CPU generator, mixed with the part's number, seeds a generator of its own. Parts
are independent of each other, ranks that hold the same part draw the same, and every rank
takes as much from its default generator as every other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

from autopar.placements import local_shape
from autopar.rules import AxisRule
from autopar.rules.schema import OpCall, op_call

aten = torch.ops.aten
_WORD = (1 << 64) - 1


class DrawContext(Protocol):
    """What is needed of the graph under construction (`codegen.lowerings.LowerContext` is one)."""

    mesh: tuple[int, ...]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node: ...

    def coord(self, axis: int) -> fx.Node: ...


# -- the op --------------------------------------------------------------------------------

_library = torch.library.Library("autopar", "DEF")
_library.define("draw(Tensor like, ScalarType dtype, str kind, float a, float b, SymInt part) -> Tensor")


def _draw(like: torch.Tensor, dtype: torch.dtype, kind: str, a: float, b: float, part: int) -> torch.Tensor:
    """A tensor of the shape and device of `like`, filled from the generator of a part.

    kind: "bernoulli" (with probability a), "uniform" (a to b), "normal" (mean a, deviation b), "exponential" (rate
    a), "random" (integers from a to below b).
    """
    base = int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())
    generator = torch.Generator(like.device).manual_seed(_mixed(base, int(part)))
    out = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
    if kind == "bernoulli":
        return out.bernoulli_(a, generator=generator)
    if kind == "uniform":
        return out.uniform_(a, b, generator=generator)
    if kind == "normal":
        return out.normal_(a, b, generator=generator)
    if kind == "exponential":
        return out.exponential_(a, generator=generator)
    return out.random_(int(a), int(b), generator=generator)


def _draw_fake(like: torch.Tensor, dtype: torch.dtype, kind: str, a: float, b: float, part: int) -> torch.Tensor:
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _mixed(base: int, part: int) -> int:
    """A seed for a part: splitmix64 (Steele, Lea and Flood 2014), whose low bits are as good as its high ones; the
    CPU generator takes 32 of them."""
    x = (base + (part + 1) * 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return (x ^ (x >> 31)) >> 1  # seeds are signed


_library.impl("draw", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::draw", _draw_fake, lib=_library)


# -- lowerings -----------------------------------------------------------------------------


def draw(ctx: DrawContext, node: fx.Node, rules: tuple[AxisRule, ...], operands: list[fx.Node]) -> Any:
    """The part of a random op's result that its rules say, one node per result of the op."""
    call = op_call(node)
    part = _part(ctx, [axis for axis, rule in enumerate(rules) if rule.lowering == "draw"])
    like = operands[0] if operands else _room(ctx, call, rules)
    made = call.out
    if call.name == "aten.native_dropout":
        keep = _kept_share(call)
        return _dropped(ctx, node, operands[0], _drawn(ctx, like, torch.bool, "bernoulli", keep, 0.0, part))
    if call.name == "aten.bernoulli" and not isinstance(call.arg("p"), float):  # the last operand is probabilities
        even = _drawn(ctx, operands[-1], call.inputs[-1].dtype, "uniform", 0.0, 1.0, part)
        below = ctx.call(aten.lt.Tensor, even, operands[-1])
        return (ctx.call(aten._to_copy.default, below, dtype=made.dtype),)
    return (_drawn(ctx, like, made.dtype, *_distribution(call), part),)


def drop_whole(ctx: DrawContext, node: fx.Node, operands: list[fx.Node]) -> Any:
    """native_dropout, drawing as one device does. On a CPU it is the drawing of a mask and a product: done apart, as
    the product is often not wanted (`tracing.dropout`); other devices have one kernel, with an order of its own."""
    call, (source, *_) = op_call(node), operands
    if call.out.device.type != "cpu":
        pair = ctx.call(aten.native_dropout.default, source, *node.args[1:])
        return tuple(ctx.call(operator.getitem, pair, index) for index in range(2))
    room = ctx.call(aten.empty_like.default, source, dtype=torch.bool, memory_format=torch.contiguous_format)
    return _dropped(ctx, node, source, ctx.call(aten.bernoulli.p, room, _kept_share(call)))


def _kept_share(call: OpCall) -> float:
    """Which share of the numbers native_dropout keeps: all of them in evaluation."""
    return 1.0 if call.arg("train") is False else 1 - float(call.arg("p"))


def _dropped(ctx: DrawContext, node: fx.Node, source: fx.Node, mask: fx.Node) -> Any:
    """(result, mask) of native_dropout; no result if nobody wants it."""
    if node.users and not any(user.target is operator.getitem and user.args[1] == 0 for user in node.users):
        return (None, mask)
    keep = _kept_share(op_call(node))
    return (ctx.call(aten.native_dropout_backward.default, source, mask, 1 / keep if keep else 0.0), mask)


def _drawn(
    ctx: DrawContext, like: fx.Node, dtype: torch.dtype, kind: str, a: float, b: float, part: fx.Node
) -> fx.Node:
    return ctx.call(torch.ops.autopar.draw.default, like, dtype, kind, a, b, part)


def _distribution(call: OpCall) -> tuple[str, float, float]:
    """(kind, a, b) of `autopar::draw` for an op."""
    name = call.name.removeprefix("aten.").removesuffix("_like").removesuffix("_functional")
    if name == "bernoulli":
        return "bernoulli", float(call.arg("p")), 0.0
    if name == "uniform":
        return "uniform", float(call.arg("from")), float(call.arg("to"))
    if name == "normal":
        return "normal", float(call.arg("mean")), float(call.arg("std"))
    if name == "exponential":
        return "exponential", float(call.arg("lambd")), 0.0
    if name == "randint":
        return "random", float(call.arg("low", 0)), float(call.arg("high"))
    return ("uniform", 0.0, 1.0) if name == "rand" else ("normal", 0.0, 1.0)


def _part(ctx: DrawContext, axes: list[int]) -> fx.Node:
    """The number of this rank's part among those that `axes` cut, an int node."""
    first, *inner = axes
    part = ctx.coord(first)
    for axis in inner:
        part = ctx.call(operator.add, ctx.call(operator.mul, part, ctx.mesh[axis]), ctx.coord(axis))
    return part


def _room(ctx: DrawContext, call: OpCall, rules: tuple[AxisRule, ...]) -> fx.Node:
    """A tensor of the local shape, for ops that have no operand to take it from."""
    state = tuple(rule.outputs[0] or "R" for rule in rules)
    shape = local_shape(tuple(map(int, call.out.shape)), state, ctx.mesh)
    assert shape is not None
    return ctx.call(aten.empty.memory_format, list(shape), dtype=call.out.dtype, device=call.out.device)
