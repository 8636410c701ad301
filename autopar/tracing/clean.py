"""A clean joint graph: no dead code, no no-ops, no expression computed twice.

Every rewrite is exact to the last bit (see `autopar.tracing.rewrites` for the sign of a
zero). The graph is functional (no op writes to its operands), so a copy can stand for its
source. An expression that the backward pass computes again is shared with the forward
pass: whether its value is kept or the op runs again is for the planner to decide. Ops
that draw random numbers are never shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import OpOverload
from autopar.tracing.at_home import work_at_home
from autopar.tracing.causal import use_causal_attention
from autopar.tracing.grouped import use_grouped_keys
from autopar.tracing.groups import use_groups
from autopar.tracing.rewrites import copy_sliced_targets, rewrite

aten = torch.ops.aten
_UNINITIALIZED = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default}
_Noop = Callable[[fx.Node, torch.Tensor, torch.Tensor], bool]


def clean(graph: fx.Graph) -> None:
    """Clean a graph in place. Nodes carry meta["phase"]; placeholders stay even if unused."""
    use_causal_attention(graph)
    while True:
        drop_noops(graph)
        share_repeated(graph)
        drop_dead(graph)
        if not (rewrite(graph) or use_grouped_keys(graph)):
            break
    use_groups(graph)
    work_at_home(graph)
    copy_sliced_targets(graph)
    drop_dead(graph)


def drop_dead(graph: fx.Graph) -> None:
    """Erase nodes without users."""
    for node in reversed(graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def drop_noops(graph: fx.Graph) -> None:
    """Replace each node that returns its operand unchanged by that operand."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    for node in list(graph.nodes):
        source = _unchanged(node)
        if source is None or (source.op == "placeholder" and output in node.users):
            continue  # a program must not hand out its own parameter or input as a result
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def share_repeated(graph: fx.Graph) -> None:
    """Compute equal expressions once, in the forward pass if that is where they are first."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_deterministic(node):
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _is_deterministic(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload):
        return getattr(target, "__module__", "") == "_operator"  # getitem
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not random and not target._schema.is_mutable and target not in _UNINITIALIZED


def _key(value: Any) -> Any:
    """A hashable form of arguments in which 1, 1.0 and True differ."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _key(value.start), _key(value.stop), _key(value.step))
    return (type(value), repr(value))


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The operand that a node returns unchanged, if it does."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    pair = _undone(node, source)
    if pair is not None:
        return pair
    before, after = source.meta.get("val"), node.meta.get("val")
    test = _NOOPS.get(node.target)
    if test is None or not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    same = before.shape == after.shape and before.dtype == after.dtype and before.device == after.device
    return source if same and before.stride() == after.stride() and test(node, before, after) else None


def _undone(node: fx.Node, source: fx.Node) -> fx.Node | None:
    """What two transpositions in a row return."""
    if source.op != "call_function" or source.target is not node.target or not source.args:
        return None
    twice = node.target is aten.t.default or (node.target is aten.transpose.int and _dims(node) == _dims(source))
    inner = source.args[0]
    return inner if twice and isinstance(inner, fx.Node) else None


def _dims(node: fx.Node) -> frozenset[int]:
    rank = node.meta["val"].ndim
    return frozenset(int(d) % rank for d in node.args[1:])  # type: ignore[arg-type]


def _always(node: fx.Node, before: torch.Tensor, after: torch.Tensor) -> bool:
    return True


def _by_one(node: fx.Node, before: torch.Tensor, after: torch.Tensor) -> bool:
    other = node.args[1]
    return isinstance(other, (int, float)) and other == 1


def _plus_zero(node: fx.Node, before: torch.Tensor, after: torch.Tensor) -> bool:
    other = node.args[1]  # integers only: -0.0 + 0 is 0.0
    return type(other) is int and other == 0 and not before.is_floating_point() and not before.is_complex()


# Ops that return their operand unchanged where shape, stride, dtype and device stay (and the test holds).
_NOOPS: dict[Any, _Noop] = {
    aten.detach.default: _always,
    aten.alias.default: _always,
    aten.lift_fresh.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.clone.default: _always,
    aten._to_copy.default: _always,
    aten.view.default: _always,
    aten._unsafe_view.default: _always,
    aten.expand.default: _always,
    aten.slice.Tensor: _always,
    aten.permute.default: lambda node, before, after: list(node.args[1]) == list(range(before.ndim)),  # type: ignore[arg-type]
    aten.pow.Tensor_Scalar: _by_one,
    aten.mul.Tensor: _by_one,
    aten.mul.Scalar: _by_one,
    aten.div.Tensor: _by_one,
    aten.div.Scalar: _by_one,
    aten.add.Tensor: _plus_zero,
    aten.add.Scalar: _plus_zero,
    aten.sub.Tensor: _plus_zero,
}
