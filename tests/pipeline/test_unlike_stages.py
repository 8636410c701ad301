"""Plans whose stages have meshes of different shape: what they come to, what they cost, and that they are right."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import autopar
import autopar.api
from autopar.cost.collectives import MeshAxis, collective_time_s
from autopar.errors import Infeasible, LayoutError
from autopar.layouts import parse_layout
from autopar.plans import Plan
from autopar.predicting.borders import borders_s
from autopar.predicting.predict import Predictor
from autopar.predicting.step import send_parts_s
from autopar.simulating.simulate import simulate_layout
from autopar.staged import StagedPlan
from autopar.trace import trace
from tests.models import ModelAndInputs, tiny_llama
from tests.widen import widened

BATCH = 8


@cache
def llama() -> ModelAndInputs:
    return tiny_llama(layers=2)


@cache
def predictor(devices: int) -> Predictor:
    model, call = llama()
    return Predictor(model, autopar.ClusterSpec.preset("cpu", gpus=devices), example_inputs=call, global_batch=BATCH)


def plan_of(devices: int, **pin: Any) -> StagedPlan:
    model, call = llama()
    found = autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=devices), example_inputs=call, pin=pin)
    assert isinstance(found, StagedPlan)
    return found


class Chain(nn.Module):
    """Products one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return (x * x).mean()


@pytest.mark.parametrize(
    ("devices", "mesh", "pin"),
    [
        (4, (2,), {"pp": 2, "dp": (2, 1), "tp": (1, 2), "zero": 1, "schedule": "zero-bubble"}),
        (8, (2, 2), {"pp": 2, "dp": "2/4", "tp": "2/1", "zero": 3, "vpp": 2}),
    ],
)
def test_right_whatever_the_shapes(devices: int, mesh: tuple[int, ...], pin: dict[str, Any]) -> None:
    model, call = Chain().double(), ((torch.randn(BATCH, 16, dtype=torch.float64),), {})
    cluster = autopar.ClusterSpec.preset("cpu", gpus=devices)
    plan = autopar.plan(model, cluster, example_inputs=call, pin={**pin, "micro_batch": 1})
    assert plan.mesh == mesh and Plan.loads(plan.dumps()) == plan
    report = autopar.verify(model, Plan.loads(plan.dumps()), example_inputs=call)
    assert report.ranks == devices and max(report.loss_error, report.worst_gradient_error) <= 1e-9


@pytest.mark.slow
def test_a_language_model_by_its_face(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autopar.api, "trace", lambda model, call: widened(trace(model, call)))
    plan = plan_of(4, pp=2, dp=(2, 1), tp=(1, 2), micro_batch=2, schedule="1f1b", zero=1)
    assert (plan.mesh, plan.roles) == ((2,), ("dp/tp",))
    assert (plan.layout()["dp"], plan.layout()["tp"]) == ([2, 1], [1, 2])
    model, call = llama()
    report = autopar.verify(model, plan, example_inputs=call)
    assert report.ranks == 4 and max(report.loss_error, report.worst_gradient_error) <= 1e-9


def test_each_stage_is_priced_by_its_own_degrees() -> None:
    of = predictor(8)
    found = of.predict("pp=2,dp=2/4,tp=2/1,sp=false,micro_batch=1")
    alike = [of.predict("pp=2,dp=2,tp=2,sp=false,micro_batch=2"), of.predict("pp=2,dp=4,tp=1,micro_batch=1")]
    apart = [of.stage_memory(one.layout, of.stages(one.layout)[at], at).total for at, one in enumerate(alike)]
    assert found.peak_bytes == round(max(apart))
    assert found.breakdown["gradients_s"] == max(one.breakdown["gradients_s"] for one in alike)
    assert found.step_time_s > min(one.step_time_s for one in alike)
    assert of.predict("pp=2,dp=2/2,tp=2/2") == of.predict("pp=2,dp=2,tp=2")


def test_the_exchange_between_unlike_stages_is_paid_for() -> None:
    """What is cut by tokens and then by samples is exchanged both ways; what is whole is gathered on one of them."""
    of = predictor(8)
    for sp, (kind, times) in {"true": ("all_to_all", 2), "false": ("all_gather", 1)}.items():
        layout = parse_layout(f"pp=2,dp=1/4,tp=4/1,micro_batch=1,sp={sp}", 8)
        jobs = of.jobs(layout)
        nbytes = max(float(job.table.boundary @ job.weights) for job in jobs)
        border_s = times * collective_time_s(kind, nbytes, MeshAxis(4, 1), of.cluster)
        assert borders_s(layout, jobs) == [border_s, 0.0]
        send_s = max(sum(send_parts_s(job)) for job in jobs)
        assert of.predict(layout).breakdown["send_s"] == pytest.approx(2 * (2 * send_s + border_s))  # 2 micro-batches


def test_degrees_that_the_model_or_batch_does_not_allow() -> None:
    with pytest.raises(LayoutError, match="8 attention heads do not divide by tp=16"):
        plan_of(32, pp=2, dp=(1, 8), cp=(1, 2), tp=(16, 1))
    with pytest.raises(Infeasible, match=r"no layout goes with the pins .* micro-batches that the schedule allows"):
        plan_of(8, pp=2, dp=(2, 4), tp=(2, 1), micro_batch=2, vpp=2)  # one micro-batch, interleaved


def test_a_memory_limit_that_no_stage_keeps() -> None:
    model, call = llama()
    cluster = autopar.ClusterSpec.preset("cpu", gpus=4)
    with pytest.raises(Infeasible, match="no layout with these degrees fits"):
        autopar.plan(
            model, cluster, example_inputs=call, memory_limit_bytes=1 << 20, pin={"pp": 2, "dp": (2, 1), "tp": (1, 2)}
        )


def test_events_are_not_simulated() -> None:
    with pytest.raises(LayoutError, match="stages of different shape are priced, not simulated"):
        simulate_layout(predictor(8), "pp=2,dp=2/4,tp=2/1")
