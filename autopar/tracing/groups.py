"""Finds how rows go to their groups and back: `autopar.grouping`'s moves in place of plain indexing.

Mixture-of-experts layers with grouped products sort their (token, expert) pairs by expert,
take the tokens' rows in that order, and bring results back by the inverse permutation.
Where a grouped product says where its groups end, and these ends come from a sort, the
permutation of that sort is followed to every `index` and accumulating `index_put` by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar.grouping import FROM_GROUPS, TO_GROUPS, is_grouped_product

aten = torch.ops.aten
_KEPT_META = ("phase", "module_path", "stack_trace", "seq_nr")
_ZEROS = (aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)


def use_groups(graph: fx.Graph) -> None:
    """Replace the moves, in place; what was only used by them stays, unused."""
    done: set[fx.Node] = set()
    for product in list(graph.nodes):
        ends = _ends(product) if product.op == "call_function" and is_grouped_product(product) else None
        if ends is None or ends in done:
            continue
        done.add(ends)
        sort = _sort_behind(ends)
        if sort is not None:
            for order in [u for u in sort.users if u.args[1:] == (1,)]:
                _follow(graph, order, ends)


def _ends(product: fx.Node) -> fx.Node | None:
    """The argument that says where groups end."""
    schema = product.target._schema  # type: ignore[union-attr]
    position = next((i for i, a in enumerate(schema.arguments) if a.name == "offs"), None)
    found = product.kwargs.get("offs")
    if found is None and position is not None and position < len(product.args):
        found = product.args[position]
    return found if isinstance(found, fx.Node) else None


def _sort_behind(ends: fx.Node) -> fx.Node | None:
    """The sort, along the one dim that there is, that the ends are counted on."""
    stack, seen = [ends], set()
    while stack:
        node = stack.pop()
        if node.target is aten.sort.default and node.args[0].meta["val"].dim() == 1:  # type: ignore[union-attr]
            return node
        if node not in seen and node.op == "call_function":
            seen.add(node)
            stack += node.all_input_nodes
    return None


def _follow(graph: fx.Graph, order: fx.Node, ends: fx.Node) -> None:
    """Replace what goes by a permutation, by which token a place of it stands for, and by its inverse."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    rows = int(order.meta["val"].shape[0])
    tokens = [u for u in order.users if u.target is aten.floor_divide.default and u.args[0] is order]
    inverse = [u for u in order.users if _is_inverse(u, order)]
    for forward in (order, *tokens):
        for user in list(forward.users):
            if _takes(user, forward):
                _replace(user, ends, place, TO_GROUPS, user.args[0], forward, ends)
            elif _adds(user, forward):
                size = int(user.meta["val"].shape[0])
                _replace(user, ends, place, FROM_GROUPS, user.args[2], forward, ends, size)
    for back in inverse:
        for user in list(back.users):
            if _takes(user, back):
                _replace(user, ends, place, FROM_GROUPS, user.args[0], order, ends, rows)
            elif _adds(user, back):
                _replace(user, ends, place, TO_GROUPS, user.args[2], order, ends)


def _is_inverse(node: fx.Node, order: fx.Node) -> bool:
    """index_put(empty, [order], arange): the inverse of a permutation."""
    if node.target is not aten.index_put.default or len(node.args) > 3:
        return False
    into, indices, values = node.args[:3]
    return (
        indices == [order]
        and isinstance(into, fx.Node)
        and isinstance(values, fx.Node)
        and values.target in (aten.arange.default, aten.arange.start_step)
        and into.meta["val"].shape == order.meta["val"].shape == values.meta["val"].shape
        and all(a == 0 for a in values.args[:-1])
    )


def _takes(node: fx.Node, index: fx.Node) -> bool:
    """node = x[index]."""
    return node.target is aten.index.Tensor and list(node.args[1]) == [index]  # type: ignore[arg-type]


def _adds(node: fx.Node, index: fx.Node) -> bool:
    """node = zeros, with values added at index."""
    if node.target is not aten.index_put.default or len(node.args) < 4 or not node.args[3]:
        return False
    into, indices, values = node.args[:3]
    whole = isinstance(values, fx.Node) and values.meta["val"].shape[1:] == node.meta["val"].shape[1:]
    return bool(list(indices) == [index] and isinstance(into, fx.Node) and into.target in _ZEROS and whole)  # type: ignore[arg-type]


def _replace(node: fx.Node, ends: fx.Node, place: dict[fx.Node, int], target: Callable[..., Any], *args: Any) -> None:
    """A new node in place of one, as late as its first user allows; nothing if the ends come too late for that."""
    if any(place.get(user, len(place)) < place[ends] for user in node.users):
        return
    after = node if place[node] > place[ends] else ends
    with node.graph.inserting_after(after):
        new = node.graph.call_function(target, args)
    values = fx.node.map_aggregate(args, lambda a: a.meta["val"] if isinstance(a, fx.Node) else a)
    with node.meta["val"].fake_mode, torch.no_grad():
        new.meta["val"] = target(*values)
    new.meta.update({k: node.meta[k] for k in _KEPT_META if k in node.meta})
    place[new] = place[after]
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
