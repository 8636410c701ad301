"""Writing results into operands: where it happens, where it must not, and that it changes no number."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import autopar
from autopar.codegen import schedule
from autopar.codegen.builder import GraphBuilder, c10d
from autopar.codegen.emit import EmittedProgram
from autopar.codegen.inplace import write_in_place
from autopar.codegen.memory import simulate_memory
from autopar.codegen.storages import storages
from autopar.verification import verify
from tests.models import tiny_bert, tiny_llama

aten = torch.ops.aten
REDUCED = (c10d.all_reduce.default, "sum", "autopar.axis0")


def program(forward: GraphBuilder, backward: GraphBuilder | None = None, saved: int = 0) -> EmittedProgram:
    """Two graphs as a program; the backward graph's inputs are the forward graph's last outputs."""
    if backward is None:
        backward = GraphBuilder((2,), forward.fake_mode)
        backward.output([])
    versions = tuple((f"v{i}", ("R",)) for i in range(saved))
    return EmittedProgram((2,), forward.graph, backward.graph, (), versions, versions, (), {}, 0, (), ())


def builder() -> tuple[GraphBuilder, fx.Node]:
    """A graph with one input [4, 4]."""
    made = GraphBuilder((2,), autopar._torch_compat.fake_tensor_mode())
    return made, made.local_input("x", torch.empty(4, 4), (4, 4))


def names(graph: fx.Graph) -> list[str]:
    return [str(n.target).split(".")[1] for n in graph.nodes if n.op == "call_function"]


def test_a_dying_operand_takes_the_result() -> None:
    b, x = builder()
    y = b.call(aten.mul.Tensor, x, 2.0)  # an input is never written to
    z = b.call(aten.add.Tensor, y, 1.0)
    v = b.call(aten.view.default, z, [16])
    w = b.call(aten.sub.Tensor, b.call(aten.view.default, b.call(aten.exp.default, x), [16]), v)
    b.output([b.call(aten.add.Tensor, x, b.call(aten.view.default, w, [4, 4]))])  # into the second: a sum commutes
    write_in_place(program(b))
    assert names(b.graph) == ["mul", "add_", "view", "exp", "view", "sub_", "view", "add_"]
    assert len(storages(n for n in b.graph.nodes if n.op == "call_function")) == 2


def test_two_saved_values_in_one_storage_move_apart() -> None:
    b, x = builder()
    y = b.call(aten.add.Tensor, b.call(aten.exp.default, x), 1.0)  # takes the place of exp
    rows = b.call(aten.view.default, y, [16])
    b.output([x, y, rows])
    backward = GraphBuilder((2,), b.fake_mode)
    whole, flat = (backward.placeholder(n, v.meta["val"]) for n, v in (("y", y), ("rows", rows)))
    column = backward.call(aten.select.int, whole, 0, 0)
    backward.output([backward.call(aten.sin.default, column), backward.call(aten.neg.default, flat)])
    write_in_place(program(b, backward, saved=2))
    assert names(b.graph) == ["exp", "add_", "view"]
    assert len(storages([whole, flat, column, y, rows])) == 1
    assert names(backward.graph) == ["select", "sin", "neg"]


def used_later(b: GraphBuilder, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    return [b.call(aten.add.Tensor, y, 1.0), b.call(aten.sin.default, y)]


def used_later_through_a_view(b: GraphBuilder, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    view = b.call(aten.transpose.int, y, 0, 1)
    return [b.call(aten.add.Tensor, y, 1.0), b.call(aten.sin.default, view)]


def handed_out(b: GraphBuilder, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    return [b.call(aten.add.Tensor, y, 1.0), y]


def part_of_a_larger_one(b: GraphBuilder, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    return [b.call(aten.add.Tensor, b.call(aten.slice.Tensor, y, 0, 0, 2), 1.0)]


def widened(b: GraphBuilder, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    double = b.call(aten._to_copy.default, x, dtype=torch.float64)
    return [b.call(aten.div.Tensor, y, double)]


def grown(b: GraphBuilder, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    return [b.call(aten.add.Tensor, b.call(aten.sum.dim_IntList, y, [0], True), x)]


def its_own_view(b: GraphBuilder, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    return [b.call(aten.add.Tensor, y, b.call(aten.transpose.int, y, 0, 1))]


def in_flight(b: GraphBuilder, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    started = b.call(c10d.all_gather_into_tensor.default, y, 2, "autopar.axis0")
    other = b.call(aten.mul.Tensor, y, 2.0)
    return [other, b.call(c10d.wait_tensor.default, started)]


def read_while_it_is_summed(b: GraphBuilder, x: fx.Node, y: fx.Node) -> list[fx.Node]:
    started = b.call(REDUCED[0], y, *REDUCED[1:])
    other = b.call(aten.sin.default, b.call(aten.view.default, y, [16]))
    return [other, b.call(c10d.wait_tensor.default, started)]


CASES = [
    used_later,
    used_later_through_a_view,
    handed_out,
    part_of_a_larger_one,
    widened,
    grown,
    its_own_view,
    in_flight,
    read_while_it_is_summed,
]


@pytest.mark.parametrize("case", CASES, ids=lambda f: f.__name__)
def test_what_somebody_needs_is_not_written_to(case) -> None:
    b, x = builder()
    b.output(case(b, x, b.call(aten.cos.default, x)))
    before = names(b.graph)
    write_in_place(program(b))
    assert names(b.graph) == before


def test_an_all_reduce_needs_no_second_buffer_and_is_waited_for_late() -> None:
    b, x = builder()
    y = b.call(c10d.wait_tensor.default, b.call(REDUCED[0], b.call(aten.cos.default, x), *REDUCED[1:]))
    other = b.call(aten.sin.default, x)
    b.output([b.call(aten.mul.Tensor, other, x), y])
    write_in_place(program(b))
    assert names(b.graph) == ["cos", "all_reduce_", "sin", "mul_", "wait_tensor"]


def test_what_the_forward_pass_saves_may_lie_in_another_storage() -> None:
    b, x = builder()
    y = b.call(aten.add.Tensor, b.call(aten.cos.default, x), 1.0)
    b.output([y])
    backward = GraphBuilder((2,), b.fake_mode)
    saved = backward.placeholder("y", y.meta["val"])
    view = backward.call(aten.view.default, saved, [16])
    backward.output([backward.call(aten.mul.Tensor, view, 3.0)])
    made = program(b, backward, saved=1)
    write_in_place(made)
    assert names(b.graph) == ["cos", "add_"] and names(backward.graph) == ["view", "mul"]
    assert storages([y]) == storages([saved]) == storages([view])


@pytest.mark.parametrize(("make", "pin"), [(tiny_llama, {"dp": 4}), (tiny_bert, {"dp": 2, "tp": 2})])
def test_numbers_stay_and_memory_falls(make, pin, monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = make(torch.float64)
    plan = autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=4), example_inputs=call, pin=pin)
    peaks, gradients = {}, {}
    original = simulate_memory

    def watched(emitted, constant):
        timeline = original(emitted, constant)
        peaks[name] = timeline.peak_bytes
        return timeline

    monkeypatch.setattr(schedule, "simulate_memory", watched)
    for name in ("in place", "apart"):
        if name == "apart":
            monkeypatch.setattr(schedule, "write_in_place", lambda program: None)
        report = verify(model, plan)
        gradients[name] = (report.loss_error, report.worst_gradient_error)
    assert gradients["in place"] == gradients["apart"]  # to the last bit
    assert peaks["in place"] <= peaks["apart"]
