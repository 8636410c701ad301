"""Fused attention over grouped keys reads each key head once, instead of a copy for each head of queries.

Models repeat keys and values (expand, clone, reshape) before they call the kernel, and their gradients are summed over
the copies after it. The kernels know grouped queries: query head h reads key head h // (heads / key heads), and their
gradients are those of the heads that there are. So nothing is copied, kept or sent around that is a copy. The numbers
are the same, but for the order of the gradients' sums.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from autopar.blockwise import ours

aten = torch.ops.aten
# op -> where its query stands
_FORWARD = {aten._scaled_dot_product_flash_attention_for_cpu.default: 0, ours.block_attention.default: 0}
_BACKWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 1,
    ours.block_attention_backward.default: 1,
}
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def use_grouped_keys(graph: fx.Graph) -> bool:
    """Give fused attention the keys that its operands repeat, in both passes; whether there were any."""
    changed = False
    for node in list(graph.nodes):
        at = _FORWARD.get(node.target)
        if at is None:
            continue
        repeated = node.args[at + 1 : at + 3]
        heads = [_heads_of(operand) for operand in repeated]
        passes = [n for n in graph.nodes if n.target in _BACKWARD and n.args[2:4] == repeated]
        if None in heads or not all(_can_follow(n) for n in passes):
            continue
        node.args = (*node.args[: at + 1], *heads, *node.args[at + 3 :])
        for backward in passes:
            backward.args = (*backward.args[:2], *heads, *backward.args[4:])
            _follow(backward)
        changed = True
    return changed


def _heads_of(operand: Any) -> fx.Node | None:
    """[batch, key heads, sequence, width] of which an operand [batch, heads, sequence, width] is copies."""
    view = operand if isinstance(operand, fx.Node) and operand.target in _VIEWS else None
    copy = _source(view, aten.clone.default)
    spread = _source(copy, aten.expand.default)
    one = _source(spread, aten.unsqueeze.default)
    if view is None or spread is None or one is None or one.args[1] != 2:
        return None
    heads: fx.Node = one.args[0]  # type: ignore[assignment]
    batch, groups, length, width = heads.meta["val"].shape
    wide = spread.meta["val"].shape
    fits = tuple(wide[:2]) == (batch, groups) and tuple(wide[3:]) == (length, width)
    return heads if fits and tuple(view.meta["val"].shape) == (batch, groups * wide[2], length, width) else None


def _source(node: fx.Node | None, target: Any) -> fx.Node | None:
    source = node.args[0] if node is not None and node.args else None
    return source if isinstance(source, fx.Node) and source.target is target else None


def _gradients(backward: fx.Node) -> list[fx.Node]:
    """Of key and value."""
    return [n for n in backward.users if n.target is operator.getitem and n.args[1] in (1, 2)]


def _can_follow(backward: fx.Node) -> bool:
    """Whether all that happens to the gradients is their sum over the copies."""
    return all(_sum_of(gradient, backward.args[1 + int(gradient.args[1])]) for gradient in _gradients(backward))  # type: ignore[arg-type]


def _sum_of(gradient: fx.Node, operand: Any) -> fx.Node | None:
    heads = _heads_of(operand)
    view = next(iter(gradient.users)) if len(gradient.users) == 1 else None
    if heads is None or view is None or view.target not in _VIEWS or len(view.users) != 1:
        return None
    batch, groups, length, width = heads.meta["val"].shape
    made, total = view.meta["val"].shape, next(iter(view.users))
    shaped = tuple(made[:2]) == (batch, groups) and tuple(made[3:]) == (length, width)
    summed = total.target is aten.sum.dim_IntList and tuple(total.args[1:]) == ([2], True) and not total.kwargs
    return total if shaped and summed else None


def _follow(backward: fx.Node) -> None:
    """New gradients in place of the sums over copies."""
    summed = {gradient: next(iter(next(iter(gradient.users)).users)) for gradient in _gradients(backward)}
    args, kwargs = fx.node.map_aggregate(
        (backward.args, backward.kwargs), lambda a: a.meta["val"] if isinstance(a, fx.Node) else a
    )
    mode = backward.args[0].meta["val"].fake_mode  # type: ignore[union-attr]
    with mode, torch.no_grad():
        backward.meta["val"] = backward.target(*args, **kwargs)  # type: ignore[operator]
    for gradient, total in summed.items():
        gradient.meta["val"] = backward.meta["val"][gradient.args[1]]
        like = total.meta["val"]
        with backward.graph.inserting_before(total):
            laid_out = backward.graph.call_function(
                aten.clone.default, (gradient,), {"memory_format": torch.contiguous_format}
            )
            made = backward.graph.call_function(aten.unsqueeze.default, (laid_out, 2))
        for node in (laid_out, made):
            node.meta = {**total.meta}
            values = fx.node.map_arg(node.args, lambda n: n.meta["val"])
            with mode, torch.no_grad():
                node.meta["val"] = node.target(*values, **node.kwargs)  # type: ignore[operator]
        assert made.meta["val"].shape == like.shape and made.meta["val"].stride() == like.stride()
        total.replace_all_uses_with(made)
