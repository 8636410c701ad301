"""Rows in groups: the two moves between tokens and experts, as ops of the joint graph.

`autopar::to_groups(x, source, ends)` is x[source]: row i of the result, in the order of the
groups, is row source[i] of x. `autopar::from_groups(rows, target, ends, size)` adds row i
to row target[i] of a tensor of `size` rows. ends [G]: where each group ends among the rows.
On one device `ends` changes nothing; where ranks hold different groups it says which rows
those are. Each is the gradient of the other.

`autopar.tracing.groups` finds both in a traced graph; rules, lowerings and the states that
rows in groups may be in ("L", "E", see `autopar.placements`) build on them.
"""

from __future__ import annotations

import weakref

import torch
from torch import fx

_library = torch.library.Library("autopar", "FRAGMENT")
_library.define("to_groups(Tensor x, Tensor source, Tensor ends) -> Tensor")
_library.define("from_groups(Tensor rows, Tensor target, Tensor ends, SymInt size) -> Tensor")


def _to_groups(x: torch.Tensor, source: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x[source]


def _from_groups(rows: torch.Tensor, target: torch.Tensor, ends: torch.Tensor, size: int) -> torch.Tensor:
    return rows.new_zeros([size, *rows.shape[1:]]).index_add(0, target, rows)


_library.impl("to_groups", _to_groups, "CompositeExplicitAutograd")
_library.impl("from_groups", _from_groups, "CompositeExplicitAutograd")
torch.library.register_fake(
    "autopar::to_groups", lambda x, source, ends: x.new_empty([source.shape[0], *x.shape[1:]]), lib=_library
)
torch.library.register_fake(
    "autopar::from_groups", lambda rows, target, ends, size: rows.new_empty([size, *rows.shape[1:]]), lib=_library
)

TO_GROUPS = torch.ops.autopar.to_groups.default
FROM_GROUPS = torch.ops.autopar.from_groups.default
GROUPED_PRODUCTS = frozenset(
    {"aten._grouped_mm", "transformers.grouped_mm_fallback", "transformers.grouped_mm_fallback_backward"}
)

_REGIONS: weakref.WeakKeyDictionary[fx.Graph, tuple[int, frozenset[fx.Node]]] = weakref.WeakKeyDictionary()


def is_grouped_product(node: fx.Node) -> bool:
    """Whether a node is a product with a matrix per group of rows."""
    return str(getattr(node.target, "overloadpacket", "")) in GROUPED_PRODUCTS


def grouped_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose tensors may be rows in groups, or say where groups end.

    By shape: those with as many rows as there are in all groups; and what the ends are computed from.
    """
    known = _REGIONS.get(graph)
    if known is None or known[0] != len(graph.nodes):
        known = (len(graph.nodes), _region(graph))
        _REGIONS[graph] = known
    return known[1]


def grouped_values(graph: fx.Graph) -> frozenset[str]:
    """The names of the values that these nodes make (as in `autopar.dataflow.value_name`)."""
    found = set()
    for node in grouped_nodes(graph):
        value = node.meta.get("val")
        for index, made in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
            if isinstance(made, torch.Tensor):
                found.add(node.name if index == 0 else f"{node.name}#{index}")
    return frozenset(found)


def _region(graph: fx.Graph) -> frozenset[fx.Node]:
    moves = [n for n in graph.nodes if n.target in (TO_GROUPS, FROM_GROUPS)]
    if not moves:
        return frozenset()
    sizes = {int(n.args[1].meta["val"].shape[0]) for n in moves}
    found = {n for n in graph.nodes if n.op == "call_function" and not sizes.isdisjoint(_rows(n))}
    for move in moves:
        stack = [move.args[2]]
        while stack:
            node = stack.pop()
            if isinstance(node, fx.Node) and node.op == "call_function" and node not in found:
                found.add(node)
                stack += node.all_input_nodes
    return frozenset(found)


def _rows(node: fx.Node) -> set[int]:
    """Leading sizes of what a node makes, and of what it takes from other ops."""
    values = [node.meta.get("val"), *(i.meta.get("val") for i in node.all_input_nodes if i.op == "call_function")]
    tensors = [t for v in values for t in (v if isinstance(v, (tuple, list)) else (v,)) if isinstance(t, torch.Tensor)]
    return {int(t.shape[0]) for t in tensors if t.dim() and isinstance(t.shape[0], int)}
