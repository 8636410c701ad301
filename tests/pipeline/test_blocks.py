"""Models of all kinds in stages, through the public face: what they may be cut between, and cuts that are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import autopar
import autopar.api
from autopar.blocks import cut_counts
from autopar.choosing.plan import choose
from autopar.errors import Infeasible, LayoutError
from autopar.layouts import Layout
from autopar.plans import Plan
from autopar.predicting.predict import Predictor
from autopar.staged import StagedPlan
from autopar.trace import trace
from tests.models import ModelAndInputs, tiny_llama
from tests.pipeline.models import DEEP
from tests.widen import widened

CLUSTER = autopar.ClusterSpec.preset("cpu", gpus=2)


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autopar.api, "trace", lambda model, call: widened(trace(model, call)))


class Chain(nn.Module):
    """An `nn.Sequential`, or modules that have names instead of numbers, and a loss."""

    def __init__(self, numbered: bool) -> None:
        super().__init__()
        self.numbered = numbered
        self.net: nn.Module = nn.Identity()
        if numbered:
            self.net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))
        else:
            self.up, self.act, self.down = nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        made = self.net(x) if self.numbered else self.down(self.act(self.up(x)))
        return nn.functional.mse_loss(made, y)


def chain(numbered: bool) -> ModelAndInputs:
    torch.manual_seed(0)
    rows = (torch.randn(8, 16, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64))
    return Chain(numbered).double(), (rows, {})


def planned(make: Callable[[], ModelAndInputs], devices: int, pin: dict[str, Any]) -> tuple[StagedPlan, ModelAndInputs]:
    model, call = make()
    found = autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=devices), example_inputs=call, pin=pin)
    plan = Plan.loads(found.dumps())
    assert isinstance(plan, StagedPlan)
    return plan, (model, call)


@pytest.mark.parametrize(
    ("make", "devices", "pin", "blocks"),
    [
        (lambda: chain(True), 2, {"pp": 2, "micro_batch": 2, "cut": "net.1"}, (1, 4)),
        (lambda: chain(True), 4, {"pp": 4, "micro_batch": 2, "cut": (1, 1, 1, 2)}, (1, 1, 1, 2)),
        (lambda: chain(False), 2, {"pp": 2, "micro_batch": 2}, None),
        (DEEP["resnet"](0), 4, {"pp": 4, "micro_batch": 8}, None),
        pytest.param(lambda: tiny_llama(layers=2), 2, {"pp": 2, "micro_batch": 2}, (1, 1), marks=pytest.mark.slow),
        pytest.param(
            DEEP["t5"](4), 2, {"pp": 2, "micro_batch": 4, "cut": "decoder.block.0"}, (2, 2), marks=pytest.mark.slow
        ),
        pytest.param(DEEP["t5"](4), 4, {"pp": 2, "vpp": 2, "micro_batch": 2, "dp": 2}, (2, 2), marks=pytest.mark.slow),
        pytest.param(DEEP["gemma3"](4), 4, {"pp": 4, "micro_batch": 4}, (1, 1, 1, 1), marks=pytest.mark.slow),
    ],
    ids=["numbered", "counts", "named", "resnet", "llama", "t5", "t5-interleaved", "gemma3"],
)  # fmt: skip
def test_stages_of_models_of_all_kinds(
    make: Callable[[], ModelAndInputs], devices: int, pin: dict[str, Any], blocks: tuple[int, ...] | None
) -> None:
    plan, (model, call) = planned(make, devices, pin)
    assert plan.named.pp == pin["pp"] and (blocks is None or plan.blocks == blocks)
    report = autopar.verify(model, plan, example_inputs=call)
    assert report.ranks == devices
    assert max(report.loss_error, report.worst_gradient_error) <= 1e-9


def test_stages_are_balanced_by_what_blocks_take() -> None:
    """Of five modules the products take the time: no stage has two of the three."""
    plan, _ = planned(lambda: chain(True), 2, {"pp": 2, "micro_batch": 2})
    assert sum(plan.blocks) == 5 and min(plan.blocks) >= 2
    assert plan.predicted["breakdown"]["blocks_per_stage"] == list(plan.blocks)


NAMES = ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"pp": 2, "cut": "decoder.block.1.layer.0"},
         "decoder.block.1.layer.0 lies inside of decoder.block.1, which cannot be cut; a stage may begin at "
         "encoder.block.1, decoder.block.0, decoder.block.1"),
        ({"pp": 2, "cut": "lm_head"}, "lm_head is no block of the model; a stage may begin at encoder.block.1"),
        ({"pp": 2, "cut": (3, 2)}, "cut=3/2 is 5 blocks, but the model has 4 .encoder.block.0, "),
        ({"pp": 3, "cut": ("decoder.block.1", "decoder.block.0")}, "not in the order in which the blocks run"),
        ({"pp": 3, "cut": "decoder.block.0"}, "does not make pp=3 stages; name the 2 modules at which stages begin"),
        ({"cut": "decoder.block.0"}, "needs a pipeline; give pp of at least 2"),
        ({"pp": 2, "vpp": 2, "cut": "decoder.block.0"}, "does not go with vpp=2"),
    ],
)  # fmt: skip
def test_cuts_that_cannot_be_made(layout: dict[str, Any], says: str) -> None:
    with pytest.raises(LayoutError, match=says) as error:
        cut_counts(Layout(**layout), NAMES)
    assert "\n" not in str(error.value)


def test_the_face_refuses_them_too() -> None:
    model, call = chain(True)
    with pytest.raises(LayoutError, match=r"net.7 is no block of the model; a stage may begin at net.1, net.2, net.3"):
        autopar.plan(model, CLUSTER, example_inputs=call, pin={"pp": 2, "cut": "net.7"})
    with pytest.raises(LayoutError, match="give numbers that add up to 5"):
        autopar.predict(model, CLUSTER, "pp=2,cut=3/1", example_inputs=call, global_batch=8)
    with pytest.raises(Infeasible, match=r"pp=8, but the model has 5 blocks \(net.0, net.1, net.2, net.3, net.4\)"):
        autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=8), example_inputs=call, pin={"pp": 8})


def test_batch_norms_get_the_whole_batch() -> None:
    plan, _ = planned(DEEP["resnet"](0), 2, {"pp": 2})
    assert plan.named.micro_batch * plan.named.dp == 8
    model, call = DEEP["resnet"](0)()
    with pytest.raises(
        Infeasible, match=r"statistics of the whole batch of 8 .as batch norm does., so that micro_batch=2"
    ):
        autopar.plan(model, CLUSTER, example_inputs=call, pin={"pp": 2, "micro_batch": 2})


def test_what_is_chosen_to_run_uses_all_devices() -> None:
    """`plan` may leave ranks idle, which no program does; `compile` looks for others."""
    model, call = chain(True)
    three = autopar.ClusterSpec.preset("cpu", gpus=3)
    predictor = Predictor(model, three, example_inputs=call, global_batch=8)
    assert choose(predictor, {"pp": 2}, 10.0).devices == 2
    assert choose(predictor, {"schedule": "1f1b"}, 10.0, to_run=True).devices == 3
    with pytest.raises(Infeasible, match="none of them works on all 3 devices, and ranks without work cannot be run"):
        choose(predictor, {"pp": 2}, 10.0, to_run=True)


def test_a_cut_as_text() -> None:
    assert Layout(pp=3, cut=("a.1", "a.2")).cut == "a.1/a.2"  # type: ignore[arg-type]
    assert str(Layout(pp=2, cut="3/1")).endswith("cut=3/1")
