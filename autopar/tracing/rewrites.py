"""Patterns of ops that cost more than what they compute.

Each rewrite gives the same numbers to the last bit, but for the sign of a zero (a sum of
padded slices adds zeros, and -0.0 + 0.0 is 0.0). `autopar.tracing.clean` applies them all
until none applies; what they leave behind unused it drops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_KEPT_META = ("phase", "module_path", "stack_trace", "seq_nr")
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_ANDS = (aten.bitwise_and.Tensor, aten.logical_and.default)
_BY_A_NUMBER = (
    aten.mul.Scalar, aten.mul.Tensor, aten.div.Scalar, aten.div.Tensor, aten.add.Scalar, aten.add.Tensor,
    aten.pow.Tensor_Scalar, aten.neg.default,
)  # fmt: skip
_LOOK_UPS = (aten.embedding.default, aten.embedding_dense_backward.default)
_LOSSES = {  # where their classes stand
    aten.nll_loss_forward.default: 1, aten.nll_loss2d_forward.default: 1,
    aten.nll_loss_backward.default: 2, aten.nll_loss2d_backward.default: 2,
}  # fmt: skip
_EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)
_ELEMENTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)


def rewrite(graph: fx.Graph) -> bool:
    """Apply each pattern once at each node, in order; whether any applied."""
    changed = False
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor) or not node.users:
            continue
        changed |= _small_operand(node) is not None or _copied_index(node) is not None
        for pattern in _PATTERNS:
            better = pattern(node)
            if better is not None and better is not node and _same_layout(better, node):
                node.replace_all_uses_with(better)
                changed = True
                break
    return changed


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return bool(x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype and x.device == y.device)


def _insert(before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A new node in front of `before`, of the same phase and module, with its fake result."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    values = fx.node.map_aggregate((args, kwargs), lambda a: a.meta["val"] if isinstance(a, fx.Node) else a)
    with before.meta["val"].fake_mode, torch.no_grad():
        node.meta["val"] = target(*values[0], **values[1])
    node.meta.update({k: before.meta[k] for k in _KEPT_META if k in before.meta})
    return node


def _operand(node: fx.Node, index: int = 0) -> fx.Node | None:
    """A tensor operand, if that is what stands at `index`."""
    value = node.args[index] if index < len(node.args) else None
    return value if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor) else None


# -- views and casts in a row -----------------------------------------------------------------


def _view_of_view(node: fx.Node) -> fx.Node | None:
    """Two reshapes in a row are one, or none."""
    inner = _operand(node) if node.target in _VIEWS else None
    source = _operand(inner) if inner is not None and inner.target in _VIEWS else None
    if source is None:
        return None
    if _same_layout(source, node):
        return source if source.op != "placeholder" else None
    try:
        with source.meta["val"].fake_mode:
            aten.view.default(source.meta["val"], list(node.meta["val"].shape))
    except (RuntimeError, ValueError):
        return None  # the strides of the source do not allow it at once
    return _insert(node, aten.view.default, source, list(node.meta["val"].shape))


def _cast_of_cast(node: fx.Node) -> fx.Node | None:
    """A cast to a dtype that holds every value, and on to another (perhaps back), is the second cast alone."""
    inner = _operand(node) if _only_casts(node) else None
    source = _operand(inner) if inner is not None and _only_casts(inner) else None
    if source is None or inner is None or not holds(inner.meta["val"].dtype, source.meta["val"].dtype):
        return None
    if node.meta["val"].dtype == source.meta["val"].dtype:
        return source if source.op != "placeholder" else None
    return _insert(node, aten._to_copy.default, source, **node.kwargs)


def _only_casts(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of dtype `narrow` is one of dtype `wide`."""
    if narrow == torch.bool or wide == narrow:
        return not wide.is_complex
    if wide == torch.bool or wide.is_complex or narrow.is_complex:
        return False
    if narrow.is_floating_point:
        a, b = torch.finfo(wide) if wide.is_floating_point else None, torch.finfo(narrow)
        return a is not None and a.eps <= b.eps and a.max >= b.max and a.tiny <= b.tiny
    low, high = torch.iinfo(narrow).min, torch.iinfo(narrow).max
    if wide.is_floating_point:
        return high <= 2 / torch.finfo(wide).eps and high <= torch.finfo(wide).max
    return torch.iinfo(wide).min <= low and high <= torch.iinfo(wide).max


# -- work on copies of one number -------------------------------------------------------------


def _small_operand(node: fx.Node) -> fx.Node | None:
    """An expanded tensor whose user would expand it itself, or an op on such a tensor and a number: the small one."""
    if node.target is aten.expand.default:
        small, wide = _operand(node), node
    elif node.target in _BY_A_NUMBER and len(node.all_input_nodes) == 1:
        wide = node.all_input_nodes[0]
        small = _operand(wide) if wide.target is aten.expand.default and wide is node.args[0] else None
    else:
        return None
    if small is None or small.meta["val"].numel() == node.meta["val"].numel():
        return None
    users = [u for u in node.users if _broadcasts(u, node)]
    if wide is not node:
        if len(users) < len(node.users):
            return None  # somebody needs it large
        small = _insert(node, node.target, small, *node.args[1:], **node.kwargs)
    for user in users:
        user.replace_input_with(node, small)
    return small if users else None


def _broadcasts(user: fx.Node, operand: fx.Node) -> bool:
    """Whether a user is an elementwise op of two tensors, whose other operand has the shape of its result."""
    if user.target not in _ELEMENTWISE or len(user.all_input_nodes) != 2:
        return False
    other = next(n for n in user.all_input_nodes if n is not operand)
    shape = user.meta["val"].shape
    return bool(operand.meta["val"].shape == shape and other.meta["val"].shape == shape)


# -- look-ups ---------------------------------------------------------------------------------


def _copied_index(node: fx.Node) -> fx.Node | None:
    """An expanded index of embeddings is copied: the copy can be cut like the rest of the batch, a view of the small
    index cannot, and every rank would look all of it up."""
    if node.target is not aten.expand.default or node.meta["val"].numel() == node.args[0].meta["val"].numel():  # type: ignore[union-attr]
        return None
    users = [u for u in node.users if u.target in _LOOK_UPS and u.args[1] is node]
    if not users:
        return None
    after = min(users, key=list(node.graph.nodes).index)
    copy = _insert(after, aten.clone.default, node, memory_format=torch.contiguous_format)
    for user in users:
        user.replace_input_with(node, copy)
    return copy


def copy_sliced_targets(graph: fx.Graph) -> None:
    """The classes that a loss reads, where they are a slice of the labels, are copied: a language model's labels are
    those of the next token, one fewer or one more than there are tokens, so that views of them cannot be cut as the
    logits are. A copy can. (Models ask for one, but a slice of one sample lies side by side as it is.)"""
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and _only_classes(node):
            copy = _insert(node.next, aten.clone.default, node, memory_format=torch.contiguous_format)
            copy.meta.update({k: node.meta[k] for k in _KEPT_META if k in node.meta})
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)


def _only_classes(node: fx.Node) -> bool:
    """Whether a tensor, or views of it, are used as the target of losses and for nothing else."""
    for user in node.users:
        is_target = user.target in _LOSSES and user.args[_LOSSES[user.target]] is node
        if not (is_target or (user.target in _VIEWS and _only_classes(user))):
            return False
    return bool(node.users)


# -- what is known to be true -----------------------------------------------------------------


def _and_true(node: fx.Node) -> fx.Node | None:
    """`x & True` is x."""
    if node.target not in _ANDS or node.meta["val"].dtype != torch.bool:
        return None
    for mask, other in ((_operand(node, 0), _operand(node, 1)), (_operand(node, 1), _operand(node, 0))):
        if mask is not None and other is not None and _is_true(mask) and other.op != "placeholder":
            return other
    return None


def _is_true(node: fx.Node) -> bool:
    if node.target in (aten.ones.default, aten.new_ones.default):
        return node.meta["val"].dtype == torch.bool
    if node.target is aten.full.default:
        return node.meta["val"].dtype == torch.bool and bool(node.args[1])
    return False


# -- sums of padded slices --------------------------------------------------------------------


def _sum_of_slices(node: fx.Node) -> fx.Node | None:
    """The sum of slices padded with zeros that together fill a dim is their concatenation."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    leaves = _padded_slices(node)
    if leaves is None or len({(tuple(n.args[1]), n.args[2], n.meta["val"].dtype) for n in leaves}) != 1:  # type: ignore[arg-type]
        return None
    sizes, dim = list(leaves[0].args[1]), int(leaves[0].args[2])  # type: ignore[arg-type]
    ranges = {n: _range(n, sizes[dim]) for n in leaves}
    if any(r is None for r in ranges.values()):
        return None
    ordered = sorted(leaves, key=lambda n: ranges[n])  # type: ignore[arg-type,return-value]
    borders = [0, *(end for n in ordered for end in ranges[n][1:])]  # type: ignore[index]
    if borders[-1] != sizes[dim] or any(ranges[n][0] != b for n, b in zip(ordered, borders, strict=False)):  # type: ignore[index]
        return None
    return _insert(node, aten.cat.default, [n.args[0] for n in ordered], dim)


def _padded_slices(node: fx.Node) -> list[fx.Node] | None:
    """The slice_backward nodes that a tree of sums adds up; None if it adds anything else."""
    found = []
    for operand in node.args:
        if not isinstance(operand, fx.Node) or len(operand.users) != 1:
            return None
        if operand.target is aten.slice_backward.default:
            found.append(operand)
        elif operand.target is aten.add.Tensor and not operand.kwargs:
            inner = _padded_slices(operand)
            if inner is None:
                return None
            found += inner
        else:
            return None
    return found


def _range(node: fx.Node, size: int) -> tuple[int, int] | None:
    """[start, end) of a slice_backward with step 1."""
    _, _, _, start, end, step = node.args
    if step != 1:
        return None
    first, last = (int(x) + size if int(x) < 0 else min(int(x), size) for x in (start, end))  # type: ignore[arg-type]
    return first, last


# -- tensors that are filled piece by piece -----------------------------------------------------


def _filled(node: fx.Node) -> fx.Node | None:
    """An empty tensor whose pieces along a dim are all written, the last one last, is these pieces glued together."""
    pieces: list[fx.Node] = []
    at: Any = node
    dim = first = None
    while (written := _piece(at)) is not None:
        piece, along, start, stop = written
        if dim not in (None, along) or stop != (node.meta["val"].shape[along] if first is None else first):
            return None
        pieces, dim, first, at = [piece, *pieces], along, start, at.args[0]
    return _insert(node, aten.cat.default, pieces, dim) if at.target in _EMPTY and first == 0 else None


def _piece(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """(what a slice_scatter of step 1 writes, along which dim, from where, to where)."""
    source = _operand(node, 1) if node.target is aten.slice_scatter.default else None
    if source is None:
        return None
    whole = node.meta["val"]
    given: dict[str, Any] = dict(zip(("dim", "start", "end", "step"), node.args[2:], strict=False))
    dim, start, step = given.get("dim", 0) % whole.dim(), given.get("start") or 0, given.get("step", 1)
    end = given.get("end")
    stop = whole.shape[dim] if end is None else min(end, whole.shape[dim])
    if source.target is aten.copy.default and (value := _operand(source, 1)) is not None and _same_kind(value, source):
        source = value
    fits = step == 1 and 0 <= start < stop and source.meta["val"].dtype == whole.dtype
    return (source, dim, start, stop) if fits else None


def _same_kind(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return bool(x.shape == y.shape and x.dtype == y.dtype)


_PATTERNS: tuple[Callable[[fx.Node], fx.Node | None], ...] = (
    _view_of_view,
    _cast_of_cast,
    _and_true,
    _sum_of_slices,
    _filled,
)
