"""Plans by degrees: what they come to op by op, `verify` on them, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import autopar
import autopar.api
from autopar.blocks import blocks_of
from autopar.codegen.builder import is_collective
from autopar.errors import LayoutError, PlanMismatch, TraceError, VerifyError
from autopar.loss_weights import LossWeights
from autopar.plans import Plan
from autopar.runtime.make_stages import staged_program
from autopar.staged import StagedPlan
from autopar.staging import micro_batches_of, op_options, orders_of, stage_blocks
from autopar.trace import trace
from tests.models import ModelAndInputs, tiny_llama
from tests.widen import widened

BATCH, LAYERS = 8, 4


@cache
def llama() -> ModelAndInputs:
    """Labels of some rows are padded, so that micro-batches count unequally many."""
    model, (args, kwargs) = tiny_llama(layers=LAYERS)
    labels = kwargs["labels"].clone()
    labels[0, 3:] = labels[3, 9:] = -100
    return model, (args, {**kwargs, "labels": labels})


@cache
def plan_of(devices: int, **pin: Any) -> StagedPlan:
    """A plan of the Llama under a pin."""
    model, call = llama()
    found = autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=devices), example_inputs=call, pin=pin)
    assert isinstance(found, StagedPlan)
    return found


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autopar.api, "trace", lambda model, call: widened(trace(model, call)))


@pytest.mark.parametrize(
    ("devices", "pin"),
    [
        (4, {"pp": 2, "tp": 2, "micro_batch": 2, "sp": True, "schedule": "zero-bubble"}),
        pytest.param(2, {"pp": 2, "vpp": 2, "micro_batch": 1, "recompute": "full"}, marks=pytest.mark.slow),
        pytest.param(4, {"pp": 2, "cp": 2, "micro_batch": 2}, marks=pytest.mark.slow),
        pytest.param(8, {"pp": 4, "dp": 2, "zero": 3, "micro_batch": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value),
)
def test_verify_runs_the_whole_schedule(devices: int, pin: dict[str, Any]) -> None:
    model, call = llama()
    plan = Plan.loads(plan_of(devices, **pin).dumps())
    report = autopar.verify(model, plan, example_inputs=call)
    assert report.ranks == devices
    assert max(report.loss_error, report.worst_gradient_error) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "once"), [(1, True), (3, False)])
def test_parameters_in_parts_are_gathered_once_a_step_but_for_zero_3(zero: int, once: bool) -> None:
    model, call = llama()
    plan = plan_of(4, pp=2, dp=2, zero=zero, micro_batch=1)
    made = staged_program(
        model, call, plan, lambda one: widened(trace(model, one)), autopar.api._plan_trace, lambda make: make()
    )
    for stage in made.program.stages:
        assert (stage.gather is not None) is once
        assert any(map(is_collective, stage.gather.graph.nodes)) if stage.gather else True
        sources = [n for n in stage.forward.graph.nodes if is_collective(n) and "gather" in str(n.target)]
        assert (len(sources) > 1) is not once, "one is of activations"
    if once:
        report = autopar.verify(model, plan, example_inputs=call)
        assert max(report.loss_error, report.worst_gradient_error) <= 1e-9


@pytest.mark.slow
def test_verify_finds_a_wrong_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = llama()
    plan = plan_of(2, pp=2, micro_batch=4, schedule="gpipe")
    monkeypatch.setattr(LossWeights, "of", lambda self, batches: [1 / len(batches)] * len(batches))
    with pytest.raises(VerifyError, match="losses are weighed"):
        autopar.verify(model, plan, example_inputs=call)  # a mean over unequal counts is no mean of means


def test_micro_batches_that_do_not_divide_the_batch() -> None:
    model, (_, kwargs) = llama()
    plan = plan_of(2, pp=2, micro_batch=4, schedule="gpipe")
    short = ((), {name: t[:6] for name, t in kwargs.items()})
    with pytest.raises(PlanMismatch, match=r"batch of 6 does not divide .* 1 \* 4 = 4 samples; pass a multiple of 4"):
        autopar.verify(model, plan, example_inputs=short)


def test_a_loss_that_is_no_sum_over_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = llama()
    plan = plan_of(2, pp=2, micro_batch=4, schedule="gpipe")

    class Squared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **kwargs: torch.Tensor) -> torch.Tensor:
            return self.inner(**kwargs).loss ** 2

    with pytest.raises(TraceError, match="use one micro-batch a step"):
        autopar.verify(Squared(), plan, example_inputs=call)


def test_schedules_that_do_not_go_with_the_counts() -> None:
    plan = plan_of(2, pp=2, micro_batch=4, schedule="gpipe")
    chunks = replace(plan, layout_keys={**plan.layout_keys, "vpp": 3, "schedule": "interleaved"})
    with pytest.raises(LayoutError, match="rank 0 has 2 blocks for vpp=3 chunks; change vpp or pp"):
        stage_blocks(chunks)
    with pytest.raises(LayoutError, match="needs a multiple of pp=2 micro-batches, found 3"):
        orders_of(chunks, 3)
    assert micro_batches_of(plan, BATCH) == 2


def test_chunks_go_around_the_ranks() -> None:
    plan = plan_of(2, pp=2, vpp=2, micro_batch=1)
    assert stage_blocks(replace(plan, blocks=(3, 2))) == (2, 1, 1, 1)
    assert stage_blocks(plan) == (1, 1, 1, 1)


def test_recomputation_becomes_pins_of_modules() -> None:
    model, call = llama()
    traced = trace(model, call)
    plan = plan_of(2, pp=2, micro_batch=4, schedule="gpipe")
    some = replace(plan, layout_keys={**plan.layout_keys, "recompute": "full", "recompute_blocks": 1})
    names = blocks_of(model, traced)
    pins = op_options(some, traced, names).pin
    blocks = {key: value for key, value in pins.items() if key.startswith("model.layers")}
    assert blocks == {f"model.layers.{i}": "keep" if i % 2 else "recompute" for i in range(LAYERS)}
    core = op_options(replace(plan, layout_keys={**plan.layout_keys, "recompute": "selective"}), traced, names).pin
    assert list(core.values()).count("recompute") in (0, LAYERS)  # 0: fused attention keeps no scores
