"""Writes results into operands that nobody needs any more.

The graphs come out functional: every op makes a new tensor. Here, last of all, an
elementwise op whose first operand dies with it writes into that operand, and so does an
all-reduce: no second buffer, no copy, fewer pages touched. Storages are known from the
fake results, so it is certain who else looks at one; parameters, inputs and what the
forward pass saved are never written to, nor is the operand of a collective in flight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import FakeTensor, pytree
from autopar.codegen.builder import c10d, is_collective
from autopar.codegen.emit import EmittedProgram
from autopar.codegen.overlap import sink_views
from autopar.codegen.storages import last_uses, storages, waits_of

aten = torch.ops.aten

# Elementwise ops that give the same numbers in place. Of low precision too: both forms round once, at the end.
# Activations and their gradients are where peaks are, and the planner counts their operands beside their results: in
# place, a program would peak below its plan, and the plan's own peak as a limit would look too small for it.
_WRITES: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.add.Scalar: aten.add_.Scalar,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.div.Tensor: aten.div_.Tensor,
    aten.div.Scalar: aten.div_.Scalar,
    aten.neg.default: aten.neg_.default,
    aten.exp.default: aten.exp_.default,
    aten.masked_fill.Scalar: aten.masked_fill_.Scalar,
    c10d.all_reduce.default: c10d.all_reduce_.default,
    c10d.all_reduce_coalesced.default: c10d.all_reduce_coalesced_.default,
}
_COMMUTES = (aten.add.Tensor, aten.mul.Tensor)


def reuse_in(graph: fx.Graph) -> None:
    """Let ops of one graph, whose inputs nobody may write to, write into operands that die with them."""
    _Reuse(graph).run()
    sink_views(graph)
    sink_reduced(graph)
    graph.lint()


def write_in_place(program: EmittedProgram) -> None:
    """Let ops of both graphs write into operands that die with them; what was reduced so is waited for late."""
    forward = _Reuse(program.forward)
    forward.run()
    backward = _Reuse(program.backward)
    results = list(program.forward.output_node().args[0])  # type: ignore[arg-type]
    saved = dict(zip(program.saved, results[len(results) - len(program.saved) :], strict=True))
    inputs = program.backward.find_nodes(op="placeholder")[len(program.mesh) :]
    for version, node in zip(program.backward_inputs, inputs, strict=True):
        if version in saved:  # it may lie in another storage now
            backward.move(node, saved[version].meta["val"])
    backward.run()
    for graph in (program.forward, program.backward):
        sink_views(graph)
        sink_reduced(graph)
        graph.lint()


class _Reuse:
    """last: until when a storage is needed. at: the nodes whose results refer to a storage."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = [n for n in graph.nodes if n.op != "output"]
        self.time = {node: i for i, node in enumerate(self.order)}
        self.last = last_uses(self.order)
        self.at: dict[int, list[fx.Node]] = {}
        for node in self.order:
            for storage in storages([node]):
                self.at.setdefault(storage, []).append(node)
        kept = [*graph.output_node().all_input_nodes, *(n for n in self.order if n.op == "placeholder")]
        self.last.update(dict.fromkeys(storages(kept), len(self.order)))

    def run(self) -> None:
        """Try all ops, in order."""
        for node in self.order:
            if node.op == "call_function" and node.target in _WRITES:
                self._try(node)

    def _try(self, node: fx.Node) -> None:
        targets, made = _listed(node.args[0]), _listed(node.meta["val"])
        if self._free(node, targets, made):
            self._write(node, targets, made)
        elif node.target in _COMMUTES and not node.kwargs and self._free(node, [node.args[1]], made):
            node.args = (node.args[1], node.args[0])
            self._write(node, [node.args[0]], made)

    def _free(self, node: fx.Node, targets: list[Any], made: list[Any]) -> bool:
        """Whether each target can take the result: laid out alike, filled from end to end, needed by nobody later."""
        found: set[int] = set()
        for target, result in zip(targets, made, strict=True):
            if not isinstance(target, fx.Node) or not _alike(target.meta["val"], result):
                return False
            (storage,) = storages([target])
            others = [n for n in node.all_input_nodes if n is not target and storage in storages([n])]
            if others or storage in found or self.last[storage] > self._end(node) or self._read_later(node, storage):
                return False
            found.add(storage)
        return True

    def _read_later(self, node: fx.Node, storage: int) -> bool:
        """Whether anyone reads a storage after `node`, be it only until a collective is waited for."""
        readers = (user for n in self.at[storage] for user in n.users if user in self.time and user is not node)
        return any(self.time[user] > self.time[node] for user in readers)

    def _end(self, node: fx.Node) -> int:
        """Until when the node itself needs its operands."""
        return max([self.time[node], *(self.time[w] for w in waits_of(node) if is_collective(node))])

    def _write(self, node: fx.Node, targets: list[Any], made: list[Any]) -> None:
        node.target = _WRITES[node.target]
        values = [t.meta["val"] for t in targets]
        self.move(node, values if isinstance(node.meta["val"], (list, tuple)) else values[0])

    def move(self, node: fx.Node, value: Any) -> None:
        """`node` has another fake result: so have the views of it (two inputs that share a storage move apart)."""
        before = list(storages([node]))
        node.meta["val"] = value
        moved = sorted({n for s in before for n in self.at.pop(s)} - {node}, key=self.time.__getitem__)
        ends = [self.last.pop(s) for s in before]
        for view in moved:
            if view.op != "placeholder":
                view.meta["val"] = _again(view)
        for one in (node, *moved):
            for storage in storages([one]):
                self.last[storage] = max([*ends, self.last.get(storage, 0)])
                self.at.setdefault(storage, []).append(one)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _alike(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    same = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return bool(same and a.numel() > 0 and a.numel() * a.element_size() == a.untyped_storage().nbytes())


def _again(view: fx.Node) -> Any:
    """The fake result of a view (or a wait), whose operand has another storage now."""
    args, kwargs = fx.node.map_aggregate(
        (view.args, view.kwargs), lambda a: a.meta["val"] if isinstance(a, fx.Node) else a
    )
    if view.target is c10d.wait_tensor.default:
        return args[0]
    mode = next(t.fake_mode for t in pytree.tree_leaves(args) if isinstance(t, FakeTensor))
    assert callable(view.target)
    with mode:
        return view.target(*args, **kwargs)


def sink_reduced(graph: fx.Graph) -> None:
    """Wait for what was reduced in place only where it is used: no buffer is held by waiting longer."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for wait in [n for n in graph.nodes if n.target is c10d.wait_tensor.default]:
        source = wait.all_input_nodes[0]
        start = source if is_collective(source) else source.all_input_nodes[0]
        in_place = (c10d.all_reduce_.default, c10d.all_reduce_coalesced_.default)
        if start.target in in_place and wait.users:
            stop = min(wait.users, key=lambda u: order[u])
            if order[stop] > order[wait] + 1:
                stop.prepend(wait)
