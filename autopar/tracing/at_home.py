"""What can be done to rows at home is not done with the experts: fewer exchanges, and of fewer bytes.

Rows go to the groups and come back in the same order, so what treats every row by itself may as well come before it
leaves, or after it is back. Models weigh the rows of results among the experts, which takes the weights of the router
there, and the gradients of the weights back. Where an expression of such ops

    comes back, and reads something that had only been taken there: it is made of what came back, at home;
    stays there, and reads nothing but what was taken there: it is made at home, and taken there once.

Elements and their sums are the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar.grouping import FROM_GROUPS, TO_GROUPS

aten = torch.ops.aten
_BY_ROWS = frozenset({aten.mul.Tensor, aten._to_copy.default, aten.unsqueeze.default, aten.squeeze.dim})
_KEPT_META = ("phase", "module_path", "stack_trace", "seq_nr")


def work_at_home(graph: fx.Graph) -> None:
    """Rewrite in place; what is no longer used stays, unused."""
    for order, ends in dict.fromkeys((n.args[1], n.args[2]) for n in graph.nodes if n.target is FROM_GROUPS):
        if isinstance(order, fx.Node) and isinstance(ends, fx.Node):
            _Region(graph, order, ends).rewrite()


class _Region:
    """The rows that go by one order to groups that end at `ends`."""

    def __init__(self, graph: fx.Graph, order: fx.Node, ends: fx.Node) -> None:
        self.graph, self.order, self.ends = graph, order, ends
        self.rows = int(order.meta["val"].shape[0])
        self.back: dict[fx.Node, fx.Node] = {}  # rows among the groups -> the same at home, made here

    def rewrite(self) -> None:
        """Both of what the module says."""
        for node in list(self.graph.nodes):
            if node.target is FROM_GROUPS and node.args[1:] == (self.order, self.ends, self.rows):
                taken, made = self._leaves(node.args[0])
                if taken and len(made) == 1:
                    node.replace_all_uses_with(self._home(node.args[0], node))
            elif node.target in _BY_ROWS and self._leaves_region(node):
                taken, made = self._leaves(node)
                if len(taken) > 1 and not made:
                    home = self._home(node, node)
                    with self.graph.inserting_before(node):
                        node.replace_all_uses_with(self._call(node, TO_GROUPS, home, self.order, self.ends))

    def _leaves_region(self, node: fx.Node) -> bool:
        """Whether something else than such an expression reads a node."""
        return any(user.target not in _BY_ROWS and not _sums_rows(user) for user in node.users)

    def _leaves(self, node: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
        """What an expression by rows reads: what was taken to the groups, and what else."""
        if self._was_taken(node):
            return {node}, set()
        if node.target not in _BY_ROWS and not _sums_rows(node):
            return set(), {node}
        taken: set[fx.Node] = set()
        made: set[fx.Node] = set()
        for operand in node.all_input_nodes:
            more = self._leaves(operand)
            taken, made = taken | more[0], made | more[1]
        return taken, made

    def _was_taken(self, node: fx.Node) -> bool:
        return node.target is TO_GROUPS and node.args[1:] == (self.order, self.ends)

    def _home(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """A value of rows among the groups, as it is at home."""
        if self._was_taken(node):
            taken = node.args[0]
            assert isinstance(taken, fx.Node)
            return taken
        if node not in self.back:
            if node.target in _BY_ROWS or _sums_rows(node):
                operands = {i: self._home(i, before) for i in node.all_input_nodes}
                with self.graph.inserting_before(before):
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
                    return self._call(before, node.target, *args, **kwargs)
            with self.graph.inserting_after(node):
                self.back[node] = self._call(node, FROM_GROUPS, node, self.order, self.ends, self.rows)
        return self.back[node]

    def _call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that belongs where another does."""
        made = self.graph.call_function(target, args, kwargs)
        values: Any = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with like.meta["val"].fake_mode, torch.no_grad():
            made.meta["val"] = target(*values[0], **values[1])
        made.meta.update({k: like.meta[k] for k in _KEPT_META if k in like.meta})
        return made


def _sums_rows(node: fx.Node) -> bool:
    """Whether a node sums the elements of each row."""
    if node.target is not aten.sum.dim_IntList:
        return False
    dims, rank = node.args[1], node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    return bool(dims) and all(d % rank for d in dims)  # type: ignore[union-attr]
