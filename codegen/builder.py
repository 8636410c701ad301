"""Builds the rank-local graph of one pass, node by node, on fake tensors.

Every node gets its fake local result at once (`meta["val"]`), so shapes, strides and
storages are known while the rest is written, a wrong local op fails at the node that
made it, and the memory of the finished graph can be simulated without running it.

The graph is the same on every rank. What differs between ranks enters as integers: one
placeholder per mesh axis with this rank's coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import FakeTensorMode
from autopar.codegen.exchange import start_permute
from autopar.codegen.row_exchange import EXCHANGES

c10d = torch.ops._c10d_functional
aten = torch.ops.aten

GROUP_PREFIX = "autopar.axis"


def group_token(axis: int) -> str:
    """The name that stands for the process group of a mesh axis until the program is bound to a mesh."""
    return f"{GROUP_PREFIX}{axis}"


def call_in(
    graph: fx.Graph, fake_mode: FakeTensorMode, target: Callable[..., Any], *args: Any, **kwargs: Any
) -> fx.Node:
    """A call at the graph's insertion point, with its fake result."""
    node = graph.call_function(target, args, kwargs)
    fake_args, fake_kwargs = fx.node.map_aggregate(
        (args, kwargs), lambda a: a.meta["val"] if isinstance(a, fx.Node) else a
    )
    if target is c10d.wait_tensor.default:  # hands back its operand, though torch's fake kernel makes a new tensor
        node.meta["val"] = fake_args[0]
    else:
        with fake_mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
    return node


class GraphBuilder:
    """An fx graph under construction. mesh: sizes of the axes. scatters_by_exchange: see `reduce_scatter`."""

    def __init__(self, mesh: Sequence[int], fake_mode: FakeTensorMode, *, scatters_by_exchange: bool = False) -> None:
        self.mesh = tuple(mesh)
        self.scatters_by_exchange = scatters_by_exchange
        self.fake_mode = fake_mode
        self.graph = fx.Graph()
        self.origin: str | None = None
        self._last_placeholder: fx.Node | None = None
        self._input_names: dict[str, int] = {}
        self._received: dict[tuple[fx.Node, int], fx.Node] = {}
        self._coords = [self.placeholder(f"coord{axis}", 0) for axis in range(len(self.mesh))]

    def placeholder(self, name: str, value: Any) -> fx.Node:
        """A new input of the graph, after the inputs that are there; its name is made unique."""
        self._input_names[name] = self._input_names.get(name, -1) + 1
        name = f"{name}__{self._input_names[name]}" if self._input_names[name] else name
        anchor = self._last_placeholder
        if anchor is None:
            node = self.graph.placeholder(name)
        else:
            with self.graph.inserting_after(anchor):
                node = self.graph.placeholder(name)
        # The generated function calls its parameters by their targets: these must be as unique as the nodes' names.
        node.target = node.name
        node.meta["val"] = value
        self._last_placeholder = node
        return node

    def local_input(self, name: str, like: torch.Tensor, shape: Sequence[int]) -> fx.Node:
        """A placeholder for a fresh contiguous local tensor of the dtype and device of `like`."""
        with self.fake_mode:
            value = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
        return self.placeholder(name, value)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call and compute its fake result."""
        node = call_in(self.graph, self.fake_mode, target, *args, **kwargs)
        if self.origin is not None:
            node.meta["origin"] = self.origin
        return node

    def coord(self, axis: int) -> fx.Node:
        """This rank's coordinate on a mesh axis, an int."""
        return self._coords[axis]

    def contiguous(self, x: fx.Node) -> fx.Node:
        """`x` itself if it is contiguous, else a contiguous copy."""
        if x.meta["val"].is_contiguous():
            return x
        return self.call(aten.clone.default, x, memory_format=torch.contiguous_format)

    def reshape(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """`x` in another shape: a view where strides allow, else a copy."""
        if tuple(x.meta["val"].shape) == tuple(shape):
            return x
        return self.call(aten.reshape.default, x, list(shape))

    def all_reduce(self, x: fx.Node, axis: int, op: str = "sum") -> fx.Node:
        """The sum (or "max") of `x` over the ranks of an axis."""
        return self._waited(c10d.all_reduce.default, self.contiguous(x), op, group_token(axis))

    def all_gather(self, x: fx.Node, axis: int) -> fx.Node:
        """The blocks of all ranks of an axis, glued along dim 0."""
        return self._waited(c10d.all_gather_into_tensor.default, self.contiguous(x), self.mesh[axis], group_token(axis))

    def group(self, axis: int) -> str:
        """What stands for the process group of an axis."""
        return group_token(axis)

    def received_counts(self, ends: fx.Node, axis: int) -> fx.Node:
        """[ranks, groups of this rank]: rows that each rank of an axis sends to this one; exchanged once."""
        if (ends, axis) not in self._received:
            counts = self.call(torch.ops.autopar.exchange_counts.default, ends, self.mesh[axis], group_token(axis))
            self._received[ends, axis] = counts
        return self._received[ends, axis]

    def received_by(self, ends: fx.Node) -> dict[int, fx.Node]:
        """The same, by axis, as far as it is known."""
        return {axis: counts for (at, axis), counts in self._received.items() if at is ends}

    def know_received(self, ends: fx.Node, axis: int, counts: fx.Node) -> None:
        """Take what another pass was told."""
        self._received[ends, axis] = counts

    def reduce_scatter(self, x: fx.Node, axis: int) -> fx.Node:
        """This rank's block along dim 0 of the sum over the ranks of an axis.

        gloo's reduce-scatter is an all-reduce of everything, most of which is then dropped: for clusters of CPUs the
        blocks are sent to where they belong and summed, half of the bytes (torch 2.13, 2 processes: 10 ms instead of
        18 for 16 MiB).
        """
        x = self.contiguous(x)
        if self.scatters_by_exchange:
            rows, *others = x.meta["val"].shape
            received = self.reshape(self.all_to_all(x, axis), [self.mesh[axis], rows // self.mesh[axis], *others])
            return self.call(aten.sum.dim_IntList, received, [0])
        return self._waited(c10d.reduce_scatter_tensor.default, x, "sum", self.mesh[axis], group_token(axis))

    def all_to_all(self, x: fx.Node, axis: int) -> fx.Node:
        """Block i along dim 0 goes to rank i of the axis; the received blocks are glued along dim 0."""
        size = self.mesh[axis]
        rows = [x.meta["val"].shape[0] // size] * size
        return self._waited(c10d.all_to_all_single.default, self.contiguous(x), rows, rows, group_token(axis))

    def permute(self, x: fx.Node, axis: int, destinations: Sequence[int]) -> fx.Node:
        """`x` of the rank of the axis that sends to this one; rank i sends to destinations[i]."""
        x = self.contiguous(x)
        return self._waited(start_permute, x, self.coord(axis), tuple(destinations), group_token(axis))

    def _waited(self, collective: Callable[..., Any], *args: Any) -> fx.Node:
        return self.call(c10d.wait_tensor.default, self.call(collective, *args))

    def output(self, values: Sequence[fx.Node | None]) -> None:
        """Close the graph."""
        self.graph.output(tuple(values))
        self.graph.lint()


def is_collective(node: fx.Node) -> bool:
    """Whether a node starts a collective."""
    if node.op != "call_function" or node.target is c10d.wait_tensor.default:
        return False
    return node.target is start_permute or getattr(node.target, "namespace", None) == "_c10d_functional"


def is_exchange(node: fx.Node) -> bool:
    """Whether a node exchanges rows with other ranks, and is done when it returns (`autopar.codegen.row_exchange`)."""
    return node.target in EXCHANGES


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a dense tensor's elements."""
    return math.prod(tensor.shape) * tensor.element_size()
