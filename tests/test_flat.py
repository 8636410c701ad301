"""Concatenations that are filled by those who make their members: where, where not, and with the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

from autopar._torch_compat import fake_tensor_mode
from autopar.codegen.buckets import GradientBuckets
from autopar.codegen.builder import GraphBuilder, c10d
from autopar.codegen.emit import EmittedProgram
from autopar.codegen.flat import fill_in_place
from autopar.codegen.inplace import write_in_place
from autopar.codegen.overlap import overlap
from autopar.codegen.storages import storages
from autopar.redistribute import Step

aten = torch.ops.aten
REDUCE = [Step("all_reduce", 0, ("P",), ("R",), 64, 2)]


def builder() -> tuple[GraphBuilder, fx.Node]:
    """A graph with one input [4, 4]."""
    made = GraphBuilder((2,), fake_tensor_mode())
    return made, made.local_input("x", torch.empty(4, 4), (4, 4))


def row(b: GraphBuilder, *members: fx.Node) -> fx.Node:
    """The concatenation of all members' elements."""
    return b.call(aten.cat.default, [b.reshape(m, [-1]) for m in members], 0)


def names(graph: fx.Graph) -> list[str]:
    """The ops with their overloads, views left out."""
    found = [str(n.target).removeprefix("aten.") for n in graph.nodes if n.op == "call_function"]
    return [n for n in found if n.split(".")[0] not in ("slice", "view", "reshape")]


def run(graph: fx.Graph) -> list[torch.Tensor]:
    x = torch.arange(16, dtype=torch.float32).reshape(4, 4).sin()
    return list(fx.GraphModule(nn.Module(), copy.deepcopy(graph))(0, x))


def filled(b: GraphBuilder, *outputs: fx.Node) -> list[str]:
    """The ops after the pass, which must not change a number."""
    b.output(list(outputs))
    before = run(b.graph)
    fill_in_place(b.graph)
    for a, c in zip(before, run(b.graph), strict=True):
        assert torch.equal(a, c)
    return names(b.graph)


def test_ops_write_into_their_parts_and_the_rest_is_copied_early() -> None:
    b, x = builder()
    product = b.call(aten.mm.default, x, x)
    looked_up = b.call(aten.tril.default, x)
    total = b.call(aten.sum.dim_IntList, x, [0])
    both = b.call(aten.add.Tensor, x, b.call(aten.cos.default, x), alpha=2)
    flat = row(b, product, total, looked_up, both)
    ops = filled(b, flat)
    assert ops == ["empty.memory_format", "mm.out", "tril.default", "copy_.default", "sum.IntList_out", "cos.default",
                   "add.out"]  # fmt: skip
    (made,) = b.graph.output_node().all_input_nodes
    assert storages([made]) == storages([product]) == storages([total]) == storages([both]) != storages([looked_up])


def needed_elsewhere(b: GraphBuilder, x: fx.Node) -> list[fx.Node]:
    product = b.call(aten.mm.default, x, x)
    return [row(b, product, b.call(aten.tril.default, x)), product]


def nothing_to_gain(b: GraphBuilder, x: fx.Node) -> list[fx.Node]:
    return [row(b, x, b.call(aten.tril.default, x))]


def in_columns(b: GraphBuilder, x: fx.Node) -> list[fx.Node]:
    return [b.call(aten.cat.default, [b.call(aten.mm.default, x, x), x], 1)]


def in_two_dtypes(b: GraphBuilder, x: fx.Node) -> list[fx.Node]:
    return [row(b, b.call(aten.mm.default, x, x), b.call(aten._to_copy.default, x, dtype=torch.float64))]


def of_another_layout(b: GraphBuilder, x: fx.Node) -> list[fx.Node]:
    turned = b.call(aten.add.Tensor, b.call(aten.t.default, x), 1.0)
    return [row(b, turned, x)]


CASES = [needed_elsewhere, nothing_to_gain, in_columns, in_two_dtypes, of_another_layout]


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_what_cannot_be_written_in_place_stays(case) -> None:
    b, x = builder()
    outputs = case(b, x)
    before = names(b.graph)
    assert filled(b, *outputs) == before


def bucketed(sizes: list[int], bucket_bytes: int, kinds: list[str | None], by_layer: bool = False) -> fx.Graph:
    """A backward graph that makes a product [n, n] per size, all of them reduced; overlapped and in place."""
    b = GraphBuilder((2,), fake_tensor_mode())
    inputs = [b.local_input("x", torch.empty(n, n), (n, n)) for n in sizes]
    buckets = GradientBuckets(b, bucket_bytes, by_layer)
    done: list[fx.Node] = []
    for x, kind in zip(inputs, kinds, strict=True):
        buckets.add(b.call(aten.mm.default, x, x), REDUCE, done.append, kind)
    buckets.flush_all()
    b.output(done)
    forward = GraphBuilder((2,), b.fake_mode)
    forward.output([])
    versions = tuple((f"x{i}", ("R",)) for i in range(len(sizes)))
    program = EmittedProgram((2,), forward.graph, b.graph, (), versions, (), (), {}, 0, (), ())
    overlap(b.graph)
    fill_in_place(b.graph)
    write_in_place(program)
    return b.graph


def test_gradients_are_reduced_where_they_are_made_and_waited_for_at_the_end() -> None:
    graph = bucketed([4, 4, 8, 4], bucket_bytes=128, kinds=[None] * 4)
    assert names(graph) == ["empty.memory_format", "mm.out", "mm.out", "_c10d_functional.all_reduce_.default",
                            "mm.default", "_c10d_functional.all_reduce_.default",
                            "mm.default", "_c10d_functional.all_reduce_.default",
                            *["_c10d_functional.wait_tensor.default"] * 3]  # fmt: skip


def test_layer_by_layer_no_bucket_holds_parts_of_two_layers() -> None:
    kinds = [None, "a", "b", "a", "b", None]
    graph = bucketed([4] * 6, bucket_bytes=1 << 20, kinds=kinds, by_layer=True)
    counts = [
        n.all_input_nodes[0].meta["val"].numel() // 16 for n in graph.nodes if n.target is c10d.all_reduce_.default
    ]
    assert counts == [1, 2, 2, 1]
