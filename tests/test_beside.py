"""Gradients of weights beside collectives that compute waits for: what moves, what must not, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

import autopar
from autopar._torch_compat import fake_tensor_mode
from autopar.codegen import schedule
from autopar.codegen.beside import compute_beside
from autopar.codegen.builder import GraphBuilder, c10d, is_collective
from autopar.trace import trace
from autopar.verification import emit_for, verify
from tests.parity.simulate import cluster

aten = torch.ops.aten


def names(graph: fx.Graph) -> list[str]:
    return [str(n.target).split(".")[1] for n in graph.nodes if n.op == "call_function"]


def builder() -> tuple[GraphBuilder, fx.Node, fx.Node]:
    """A graph with a gradient [4, 4] and a weight [4, 4]."""
    made = GraphBuilder((2,), fake_tensor_mode())
    return made, made.local_input("grad", torch.empty(4, 4), (4, 4)), made.local_input("w", torch.empty(4, 4), (4, 4))


def summed_at_once(b: GraphBuilder, x: fx.Node, w: fx.Node) -> fx.Node:
    """What a product takes of a sum over ranks that nobody waits for earlier."""
    total = b.all_reduce(b.call(aten.sum.dim_IntList, x, [0]), 0)
    return b.call(aten.mm.default, b.call(aten.sub.Tensor, x, total), w)


def test_a_gradient_of_a_weight_is_computed_while_the_ranks_sum() -> None:
    b, grad, w = builder()
    of_x = b.call(aten.mm.default, grad, w)
    of_w = b.call(aten.t.default, b.call(aten.mm.default, w, grad))
    b.output([summed_at_once(b, of_x, w), of_w])
    assert compute_beside(b.graph)
    assert names(b.graph) == ["mm", "sum", "all_reduce", "mm", "t", "wait_tensor", "sub", "mm"]


def test_its_own_reduction_starts_behind() -> None:
    b, grad, w = builder()
    of_x = b.call(aten.mm.default, grad, w)
    reduced = b.call(c10d.all_reduce.default, b.call(aten.mm.default, w, grad), "sum", "autopar.axis0")
    rest = summed_at_once(b, of_x, w)
    b.output([rest, b.call(c10d.wait_tensor.default, reduced)])
    assert compute_beside(b.graph)
    middle = ["all_reduce", "mm", "all_reduce", "wait_tensor", "sub", "mm", "wait_tensor"]
    assert names(b.graph) == ["mm", "sum", *middle]


def test_each_is_put_off_to_the_next_sum_only() -> None:
    b, grad, w = builder()
    x, found = grad, []
    for _ in range(3):
        found.append(b.call(aten.mm.default, w, x))
        x = summed_at_once(b, x, w)
    b.output([x, *found])
    assert compute_beside(b.graph)
    assert names(b.graph) == ["sum", "all_reduce", "mm", "wait_tensor", "sub", "mm"] * 3


def needed_by_the_sum(b: GraphBuilder, grad: fx.Node, w: fx.Node) -> list[fx.Node]:
    of_w = b.call(aten.mm.default, w, grad)
    return [of_w, summed_at_once(b, of_w, w)]


def needed_by_a_product(b: GraphBuilder, grad: fx.Node, w: fx.Node) -> list[fx.Node]:
    y = b.call(aten.mm.default, w, grad)
    return [b.call(aten.mm.default, y, summed_at_once(b, grad, w))]


def waited_for_before(b: GraphBuilder, grad: fx.Node, w: fx.Node) -> list[fx.Node]:
    reduced = b.all_reduce(b.call(aten.mm.default, w, grad), 0)
    return [summed_at_once(b, grad, w), reduced]


def no_product_needs_the_sum(b: GraphBuilder, grad: fx.Node, w: fx.Node) -> list[fx.Node]:
    return [b.call(aten.mm.default, w, grad), b.all_reduce(b.call(aten.sum.dim_IntList, grad, [0]), 0)]


def busy_already(b: GraphBuilder, grad: fx.Node, w: fx.Node) -> list[fx.Node]:
    of_w = b.call(aten.mm.default, w, grad)
    start = b.call(c10d.all_reduce.default, b.call(aten.sum.dim_IntList, grad, [0]), "sum", "autopar.axis0")
    other = b.call(aten.mm.default, grad, w)
    total = b.call(c10d.wait_tensor.default, start)
    return [of_w, b.call(aten.mm.default, b.call(aten.sub.Tensor, other, total), w)]


CASES = [needed_by_the_sum, needed_by_a_product, waited_for_before, no_product_needs_the_sum, busy_already]


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_what_stays(case) -> None:
    b, grad, w = builder()
    b.output(case(b, grad, w))
    before = names(b.graph)
    assert not compute_beside(b.graph)
    assert names(b.graph) == before


class Net(nn.Module):
    """Convolutions (one with a bias) and linear layers, a batch norm after each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.linear, self.norm, self.head = nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norms[0](self.first(images)))
        x = torch.relu(self.norms[1](self.second(x))).mean((2, 3))
        return self.head(torch.tanh(self.norm(self.linear(x)))).square().mean()


def net() -> tuple[nn.Module, tuple[tuple[torch.Tensor], dict]]:
    torch.manual_seed(0)
    return Net().double(), ((torch.randn(8, 3, 6, 6, dtype=torch.float64),), {})


def products_in_flight(graph: fx.Graph) -> list[list[str]]:
    """Of each collective whose result has two rows (the sums of a batch norm): the products until it is waited for."""
    found, nodes = [], list(graph.nodes)
    for start in nodes:
        if is_collective(start) and start.meta["val"].dim() == 2 and len(start.meta["val"]) == 2:
            between = nodes[nodes.index(start) : nodes.index(next(iter(start.users)))]
            targets = {aten.mm.default: "mm", aten.mm.out: "mm", aten.convolution_backward.default: "convolution"}
            found.append([targets[n.target] for n in between if n.target in targets])
    return found


def test_batch_norms_sum_beside_the_gradients_of_the_layer_behind() -> None:
    model, call = net()
    plan = autopar.plan(model, cluster((2,)), example_inputs=call, pin={"dp": 2, "zero": 0})
    program = emit_for(trace(model, call), plan)
    assert products_in_flight(program.backward) == [["mm"], ["mm"], ["convolution"]]
    masks = [
        n.args[-1] for n in program.backward.find_nodes(op="call_function", target=aten.convolution_backward.default)
    ]
    assert masks == [[True, False, False], [False, True, True], [False, True, False]]


def test_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = net()
    plan = autopar.plan(model, cluster((2,)), example_inputs=call, pin={"dp": 2, "zero": 0})
    beside = verify(model, plan)
    monkeypatch.setattr(schedule, "compute_beside", lambda graph: False)
    apart = verify(model, plan)
    assert (beside.loss_error, beside.worst_gradient_error) == (apart.loss_error, apart.worst_gradient_error)


def test_what_does_not_fit_is_not_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two peaks the program is the one without, and its peak is within the limit."""
    model, call = net()
    plan = autopar.plan(model, cluster((2,)), example_inputs=call, pin={"dp": 2, "zero": 0})
    traced = trace(model, call)

    def emitted(limit: int | None):
        given = replace(plan, options=replace(plan.options, memory_limit_bytes=limit))
        timelines = []
        original = schedule.simulate_memory
        monkeypatch.setattr(schedule, "simulate_memory", lambda *a: timelines.append(original(*a)) or timelines[-1])
        program = emit_for(traced, given)
        monkeypatch.setattr(schedule, "simulate_memory", original)
        return program, timelines[-1].peak_bytes

    _, most = emitted(None)
    program, least = emitted(most - 1)
    assert least < most and products_in_flight(program.backward) == [[], [], []]
