"""Bugs put into a pipeline on purpose: each is noticed, and its place is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import fx

from autopar.codegen.stage_types import NOTHING, PipelineProgram, StageProgram
from autopar.errors import AutoparError, VerifyError
from autopar.simulating.schedules import schedule_orders
from autopar.verifying.pipeline import verify_pipeline
from tests.models import tiny_llama
from tests.pipeline.staged import Cut, Whole, staged

MICRO_BATCHES = 2


@cache
def llama() -> Cut:
    with pytest.MonkeyPatch.context() as patch:
        return staged(Whole.of(*tiny_llama(layers=2)), [1, 1], (), MICRO_BATCHES, patch)


def with_stage(program: PipelineProgram, index: int, **changes: object) -> PipelineProgram:
    stages = list(program.stages)
    stages[index] = replace(stages[index], **changes)  # type: ignore[arg-type]
    return replace(program, stages=tuple(stages))


def altered(graph: fx.Graph, change: Callable[[list[fx.Node]], object]) -> fx.Graph:
    """A copy of a graph, changed; keeps what is known of its nodes."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    change(list(copy.nodes))
    copy.lint()
    return copy


def caught(program: PipelineProgram, said: str, schedule: str = "1f1b") -> None:
    case = replace(llama().case(), program=program)
    with pytest.raises(VerifyError, match=said):
        verify_pipeline(case, schedule_orders(schedule, 2, MICRO_BATCHES))


def test_without_a_bug() -> None:
    llama().verify("1f1b", 2)


def test_a_message_that_is_not_sent() -> None:
    stage = llama().program.stages[0]
    forward = altered(stage.forward.graph, _drop_first_result)
    quiet = with_stage(llama().program, 0, forward=replace(stage.forward, graph=forward), sends_forward=NOTHING)
    caught(quiet, r"deadlock: .*rank 1 waits for the forward of micro-batch 0 on stage 1")


def _drop_first_result(nodes: list[fx.Node]) -> None:
    nodes[-1].args = (nodes[-1].args[0][1:],)  # type: ignore[index]


def test_micro_batches_that_are_swapped() -> None:
    case = llama().case()
    labels = next(i.node for i in case.trace.inputs if i.path == "labels")
    last, first = ({**case.batches[i], labels: case.batches[1 - i][labels]} for i in (0, 1))
    with pytest.raises(VerifyError, match="loss is off"):
        verify_pipeline(replace(case, batches=[last, first]), schedule_orders("1f1b", 2, MICRO_BATCHES))


def test_a_wrong_weight() -> None:
    case = llama().case()
    with pytest.raises(VerifyError, match=r"loss is off .* it is how losses are weighed"):
        verify_pipeline(replace(case, weights=[0.5, 0.25]), schedule_orders("gpipe", 2, MICRO_BATCHES))


@pytest.mark.parametrize(("name", "at"), [("forward", 0), ("backward", 1), ("weights", 0)])
def test_a_wrong_op(name: str, at: int) -> None:
    stage: StageProgram = llama().program.stages[at]
    one = getattr(stage, name)
    found: list[fx.Node] = []

    def change(nodes: list[fx.Node]) -> None:
        node = next(n for n in nodes if str(n.target) == "aten.mul.Tensor" and "version" in n.meta)
        node.args = (node.args[0], node.args[0])
        found.append(node)

    program = with_stage(llama().program, at, **{name: replace(one, graph=altered(one.graph, change))})
    case = replace(llama().case(), program=program)
    with pytest.raises(VerifyError, match=rf"in the {name} pass of micro-batch 0 on stage {at}") as error:
        verify_pipeline(case, schedule_orders("zero-bubble", 2, MICRO_BATCHES))
    assert found[0].meta["origin"] in str(error.value)


def test_a_gradient_that_is_lost() -> None:
    stage = llama().program.stages[0]

    def change(nodes: list[fx.Node]) -> None:
        _, second, *rest = nodes[-1].args[0]  # type: ignore[misc]
        nodes[-1].args = ((second, second, *rest),)

    weights = replace(stage.weights, graph=altered(stage.weights.graph, change))
    caught(with_stage(llama().program, 0, weights=weights), "gradient of model.embed_tokens.weight is off")


def test_a_tied_gradient_that_a_stage_leaves_out() -> None:
    """Each of the two stages makes a part; without that of the last one the sum is too small."""
    with pytest.MonkeyPatch.context() as patch:
        cut = staged(Whole.of(*tiny_llama(layers=2, tied=True)), [1, 1], (), MICRO_BATCHES, patch)
    last, table = cut.program.stages[-1], "model.embed_tokens.weight"
    position = last.grads_late.index(table)

    def change(nodes: list[fx.Node]) -> None:
        results = list(nodes[-1].args[0])  # type: ignore[arg-type]
        with nodes[-1].graph.inserting_before(nodes[-1]):
            nothing = nodes[-1].graph.call_function(torch.ops.aten.mul.Tensor, (results[position], 0.0))
        nothing.meta = dict(results[position].meta)
        results[position] = nothing
        nodes[-1].args = (tuple(results),)

    weights = replace(last.weights, graph=altered(last.weights.graph, change))
    case = replace(cut.case(), program=with_stage(cut.program, last.index, weights=weights))
    with pytest.raises(VerifyError, match=f"gradient of {table} is off"):
        verify_pipeline(case, schedule_orders("1f1b", 2, MICRO_BATCHES))


def test_a_schedule_that_hangs() -> None:
    """The first stage wants a gradient before it has sent all that the last one waits for."""
    orders = schedule_orders("gpipe", 2, MICRO_BATCHES)
    first = (orders[0][0], orders[0][2], orders[0][1], orders[0][3])
    last = (orders[1][0], orders[1][1], orders[1][2], orders[1][3])
    with pytest.raises(VerifyError, match=r"rank 0 waits for the backward of micro-batch 0 on stage 0; rank 1 waits"):
        verify_pipeline(llama().case(), (first, last))


def test_stages_that_cannot_be_dealt() -> None:
    orders = schedule_orders("gpipe", 3, MICRO_BATCHES)
    with pytest.raises(AutoparError, match="2 stages cannot be dealt to 3 pipeline ranks"):
        verify_pipeline(llama().case(), orders)
