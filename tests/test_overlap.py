"""When collectives start and are waited for: what moves, what must not, and that ranks agree on counts beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import autopar
from autopar._torch_compat import fake_tensor_mode
from autopar.codegen.builder import GraphBuilder, c10d, is_collective
from autopar.codegen.overlap import overlap
from autopar.trace import trace
from autopar.verification import emit_for
from tests.models import tiny_bert, tiny_llama
from tests.parity.simulate import cluster

aten = torch.ops.aten


def names(graph: fx.Graph) -> list[str]:
    return [str(n.target).split(".")[1] for n in graph.nodes if n.op == "call_function"]


def builder() -> tuple[GraphBuilder, fx.Node, fx.Node]:
    """A graph with an input [8, 4] and whole numbers [8]."""
    made = GraphBuilder((2,), fake_tensor_mode())
    x = made.local_input("x", torch.empty(8, 4), (8, 4))
    return made, x, made.local_input("labels", torch.empty(8, dtype=torch.long), (8,))


def counted(b: GraphBuilder, labels: fx.Node) -> fx.Node:
    """How many labels of all ranks are not -100."""
    count = b.call(aten.sum.default, b.call(aten.ne.Scalar, labels, -100))
    return b.all_reduce(b.call(aten._to_copy.default, count, dtype=torch.float32), 0)


COUNT = ["ne", "sum", "_to_copy", "all_reduce"]


def test_a_count_of_labels_is_agreed_on_first_and_waited_for_at_its_use() -> None:
    b, x, labels = builder()
    y = b.call(aten.exp.default, x)
    total = b.call(aten.sum.default, y)
    count = counted(b, labels)
    b.output([b.call(aten.div.Tensor, total, count)])
    overlap(b.graph)
    assert names(b.graph) == [*COUNT, "exp", "sum", "wait_tensor", "div"]


def test_other_collectives_do_not_wait_for_a_count() -> None:
    b, x, labels = builder()
    y = b.call(aten.exp.default, x)
    gathered = b.all_gather(x, 0)
    count = counted(b, labels)
    other = counted(b, b.call(aten.add.Tensor, labels, 1))
    b.output([b.call(aten.sum.default, gathered), b.call(aten.div.Tensor, y, b.call(aten.add.Tensor, count, other))])
    overlap(b.graph)
    start = [*COUNT, "add", *COUNT, "all_gather_into_tensor"]
    rest = ["exp", "wait_tensor", "sum", "wait_tensor", "wait_tensor", "add", "div"]
    assert names(b.graph) == [*start, *rest]


def test_two_counts_of_the_same_numbers() -> None:
    b, x, labels = builder()
    y = b.call(aten.exp.default, x)
    kept = b.call(aten.ne.Scalar, labels, -100)
    ones = b.call(aten.sum.default, kept)
    first, second = b.all_reduce(ones, 0), b.all_reduce(b.call(aten.add.Tensor, ones, 1), 0)
    b.output([b.call(aten.mul.Tensor, y, first), b.call(aten.mul.Tensor, y, second)])
    overlap(b.graph)
    assert names(b.graph)[:6] == ["ne", "sum", "all_reduce", "add", "all_reduce", "exp"]


def of_activations(b: GraphBuilder, x: fx.Node, labels: fx.Node) -> fx.Node:
    return b.call(aten.sum.default, b.call(aten.mul.Tensor, b.call(aten.sum.dim_IntList, x, [1]), labels))


def drawn(b: GraphBuilder, x: fx.Node, labels: fx.Node) -> fx.Node:
    return b.call(aten.sum.default, b.call(aten.randint_like.default, labels, 4))


def more_than_a_number(b: GraphBuilder, x: fx.Node, labels: fx.Node) -> fx.Node:
    return b.call(aten.neg.default, labels)


def gathered(b: GraphBuilder, x: fx.Node, labels: fx.Node) -> fx.Node:
    return b.call(aten.sum.default, b.all_gather(labels, 0))


@pytest.mark.parametrize("case", [of_activations, drawn, more_than_a_number, gathered], ids=lambda f: f.__name__)
def test_what_stays(case) -> None:
    b, x, labels = builder()
    y = b.call(aten.exp.default, x)
    b.output([y, b.call(aten.add.Tensor, b.all_reduce(case(b, y, labels), 0), 1)])
    overlap(b.graph)
    ops = names(b.graph)
    assert ops.index("exp") < ops.index("all_reduce")


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama], ids=["bert", "llama"])
def test_data_parallel_ranks_do_not_wait_for_each_other_in_the_middle(make) -> None:
    """The count is on its way during the whole forward pass, and the backward pass does not wait for the loss."""
    model, call = make(layers=1)
    plan = autopar.plan(model, cluster((2,)), example_inputs=call, pin={"dp": 2, "zero": 0})
    program = emit_for(trace(model, call), plan)
    ops = [n for n in program.forward.nodes if n.op == "call_function"]
    count, *others = [n for n in ops if is_collective(n)]
    assert count.meta["val"].dim() == 0, str(count.format_node())
    assert len(others) == 1, f"beside the loss, which is handed out early: {others}"
    products = [n for n in ops if n.target in (aten.mm.default, aten.addmm.default, aten.bmm.default)]
    wait = next(n for n in ops if n.target is c10d.wait_tensor.default and n.all_input_nodes == [count])
    assert ops.index(count) < ops.index(products[0]) < ops.index(products[-1]) < ops.index(wait)
    assert ops[ops.index(wait) + 1] in wait.users
