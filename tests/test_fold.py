"""Repeated layers as loops: the code's length, the numbers, the memory, and what is not folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import autopar
from autopar.api import trace
from autopar.codegen import fold as folding
from autopar.codegen.builder import c10d
from autopar.codegen.fold import FoldedGraph, Repeated, fold
from autopar.codegen.repeats import find_loops
from autopar.codegen.schedule import emit_within
from autopar.cost.model import CostModel
from autopar.runtime.execute import RankProgram
from autopar.runtime.memory import measure_peak
from tests.models import ModelAndInputs, tiny_bert, tiny_llama

aten = torch.ops.aten
GROWTH = 1.3


def rank_program(make: Callable[..., ModelAndInputs], layers: int, pin: dict[str, Any]) -> RankProgram:
    """The program of rank 0 of 4, not bound to any process group."""
    model, call = make(torch.float64, layers=layers)
    plan = autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=4), example_inputs=call, pin=pin)
    costs = CostModel(plan.cluster, plan.mesh)
    emitted, _ = emit_within(trace(model, call), plan.decisions, plan.mesh, costs, 0, None)
    axes = range(len(plan.mesh))
    return RankProgram(emitted, [f"group{a}" for a in axes], [0 for _ in axes])


def loops(folded: FoldedGraph) -> list[Repeated]:
    return [m for m in folded.module.modules() if isinstance(m, Repeated)]


@pytest.mark.parametrize(
    ("make", "pin"),
    [
        (tiny_llama, {"dp": 4}),
        (tiny_bert, {"dp": 4, "zero": 3}),
        pytest.param(tiny_llama, {"dp": 4, "zero": 3}, marks=pytest.mark.slow),
        pytest.param(tiny_llama, {"tp": 4}, marks=pytest.mark.slow),
        pytest.param(tiny_llama, {"dp": 2, "tp": 2}, marks=pytest.mark.slow),
    ],
)
def test_code_of_32_layers_is_as_long_as_that_of_4(make: Callable[..., ModelAndInputs], pin: dict[str, Any]) -> None:
    few, many = (rank_program(make, layers, pin) for layers in (4, 32))
    length = {}
    for name, program in (("few", few), ("many", many)):
        folded = (program.folded_forward, program.folded_backward)
        length[name] = sum(len(f.code()) for f in folded)
        assert all(loops(f) for f in folded)
    assert length["many"] <= GROWTH * length["few"]
    flat = len(many.forward_module.code) + len(many.backward_module.code)
    assert 5 * length["many"] < flat


def trained(model: Any, call: Any, steps: int = 2) -> tuple[list[torch.Tensor], int]:
    """Parameters after some steps of AdamW on one device, and the peak of the last step."""
    program = autopar.compile(model, autopar.ClusterSpec.preset("cpu", gpus=1), example_inputs=call)
    optimizer = torch.optim.AdamW(program.parameters())

    def step() -> None:
        program.train_step(*call[0], **call[1])
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(steps):
        step()
    peak = measure_peak(step, program, optimizer, *call[1].values())
    (compiled,) = program._compiled.values()
    found = [len(loops(f)) for f in (compiled.rank_program.folded_forward, compiled.rank_program.folded_backward)]
    assert all(found) == (folding.find_loops is find_loops)
    return [p.detach() for p in program.parameters()], peak


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_numbers_and_memory_are_those_of_the_flat_program(
    make: Callable[..., ModelAndInputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    folded, folded_peak = trained(*make(torch.float32, layers=6))
    monkeypatch.setattr(folding, "find_loops", lambda graph: [])
    flat, flat_peak = trained(*make(torch.float32, layers=6))
    assert all(torch.equal(a, b) for a, b in zip(folded, flat, strict=True))
    assert folded_peak == flat_peak


@pytest.mark.parametrize("pin", [{"dp": 4, "zero": 3}, pytest.param({"dp": 2, "tp": 2}, marks=pytest.mark.slow)])
def test_folded_programs_are_verified(pin: dict[str, Any]) -> None:
    model, call = tiny_llama(torch.float64, layers=7)
    plan = autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=4), example_inputs=call, pin=pin)
    assert autopar.verify(model, plan).worst_gradient_error < 1e-9


# -- graphs by hand -----------------------------------------------------------------------------------------------


def layered(body: Callable[..., Any], layers: int = 5) -> fx.Graph:
    """x, then a weight a layer; x = body(x, weight, layer) for each; returns x and what the layers leave behind."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    weights = [graph.placeholder(f"w{i}") for i in range(layers)]
    kept = []
    for layer, weight in enumerate(weights):
        x, left = body(graph, x, weight, layer)
        kept += left
    graph.output((x, *kept))
    return graph


def chain(graph: fx.Graph, x: fx.Node, count: int) -> fx.Node:
    for op in [aten.sin.default, aten.cos.default, aten.tanh.default, aten.neg.default, aten.exp.default][:count]:
        x = graph.call_function(op, (x,))
    return graph.call_function(aten.tanh.default, (x,))


def saving(graph: fx.Graph, x: fx.Node, weight: fx.Node, layer: int) -> Any:
    y = graph.call_function(aten.mul.Tensor, (chain(graph, x, 5), weight))
    return chain(graph, y, 4), [graph.call_function(aten.reshape.default, (y, [2, 2]))]


def numbered(graph: fx.Graph, x: fx.Node, weight: fx.Node, layer: int) -> Any:
    y = graph.call_function(aten.mul.Tensor, (chain(graph, x, 5), layer))
    return graph.call_function(aten.add.Tensor, (chain(graph, y, 4), weight)), []


def skipping(graph: fx.Graph, x: fx.Node, weight: fx.Node, layer: int) -> Any:
    """Each layer also reads the graph's first input and, in the second half, other weights."""
    first, last = (list(graph.nodes)[i] for i in (0, 5))
    y = graph.call_function(aten.mul.Tensor, (chain(graph, x, 5), first))
    return graph.call_function(aten.add.Tensor, (chain(graph, y, 4), last if layer > 2 else weight)), []


def run(folded: FoldedGraph, values: list[torch.Tensor]) -> list[torch.Tensor]:
    return folded(list(values))


@pytest.mark.parametrize(
    ("body", "turns"), [(saving, [5]), (numbered, []), (skipping, [5])], ids=["saving", "numbered", "skipping"]
)
def test_loops_by_hand(body: Callable[..., Any], turns: list[int]) -> None:
    graph = layered(body)
    folded = fold(graph)
    assert [loop.turns for loop in loops(folded)] == turns
    values = [torch.randn(4, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    expected = fx.Interpreter(fx.GraphModule(torch.nn.Module(), graph)).run(*values)
    results = run(folded, values)
    assert len(results) == len(expected) and all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_results_are_waited_for_as_a_list_at_the_end() -> None:
    def reduced(graph: fx.Graph, x: fx.Node, weight: fx.Node, layer: int) -> Any:
        y = graph.call_function(aten.mul.Tensor, (chain(graph, x, 5), weight))
        started = graph.call_function(c10d.all_reduce.default, (chain(graph, y, 2), "sum", "0"))
        return chain(graph, y, 3), [started]

    graph = layered(reduced)
    with graph.inserting_before(graph.output_node()):
        x, *started = graph.output_node().args[0]
        waits = [graph.call_function(c10d.wait_tensor.default, (s,)) for s in started]
    graph.output_node().args = ((x, *waits),)
    text = fold(graph).code()
    assert text.count("wait_tensor") == 1 and text.count("functional.all_reduce.default(") == 1
