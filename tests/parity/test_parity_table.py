"""The parity table: families x layouts on 8 simulated ranks, through the public face, in float64 to nine digits.

Pipelines of 2 and 4 stages of every family, then mixed layouts: data, tensor, sequence and pipeline ranks, ZeRO,
recomputation, cuts and schedules together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import autopar
import autopar.api
from autopar.plans import Plan
from autopar.runtime.make_stages import staged_program
from autopar.staged import StagedPlan
from autopar.trace import trace
from tests.parity.staged_traffic import assert_sends_what_is_paid_for
from tests.parity.staged_training import assert_trains_alike
from tests.pipeline.models import DEEP
from tests.widen import widened

RANKS, LAYERS = 8, 4
PIPELINES: dict[str, dict[str, Any]] = {
    "pp2-dp2-tp2": {"pp": 2, "dp": 2, "tp": 2, "micro_batch": 2},
    "pp4-dp2": {"pp": 4, "dp": 2, "micro_batch": 1},
}
OF_IMAGES: dict[str, dict[str, Any]] = {  # batch norm takes the whole batch: one micro-batch
    "pp2-dp2-tp2": {"pp": 2, "dp": 2, "tp": 2, "micro_batch": 4},
    "pp4-dp2": {"pp": 4, "dp": 2, "micro_batch": 4},
}
MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence-parallel-zero1": (
        "llama", {"pp": 2, "dp": 2, "tp": 2, "sp": True, "zero": 1, "micro_batch": 1, "schedule": "1f1b"}),
    "ring-tensor-recompute": ("llama", {"pp": 2, "cp": 2, "tp": 2, "micro_batch": 4, "recompute": "full"}),
    "ring-data-zero3": ("llama", {"pp": 2, "cp": 2, "dp": 2, "zero": 3, "micro_batch": 2}),
    "ring-four": ("llama", {"pp": 2, "cp": 4, "micro_batch": 4, "schedule": "zero-bubble"}),
    "zero-bubble-tied": ("gpt2", {"pp": 2, "dp": 2, "tp": 2, "micro_batch": 2, "schedule": "zero-bubble"}),
    "interleaved-zero1-tied": ("gpt2", {"pp": 2, "vpp": 2, "dp": 4, "zero": 1, "micro_batch": 1}),
    "gpipe-zero3-recompute": (
        "gpt2", {"pp": 4, "dp": 2, "zero": 3, "micro_batch": 2, "schedule": "gpipe", "recompute": "full"}),
    "encoder-decoder-cut-by-name": (
        "t5", {"pp": 2, "dp": 2, "tp": 2, "micro_batch": 2, "cut": "decoder.block.0", "recompute": "selective"}),
    "encoder-decoder-interleaved": ("t5", {"pp": 2, "vpp": 2, "tp": 4, "micro_batch": 4}),
    "window-some-blocks-again": (
        "gemma3", {"pp": 2, "dp": 2, "tp": 2, "micro_batch": 2, "recompute": "full", "recompute_blocks": 1}),
    "window-four-stages-zero1": ("gemma3", {"pp": 4, "dp": 2, "zero": 1, "micro_batch": 2, "schedule": "zero-bubble"}),
    "experts-tensor-zero1": ("mixtral", {"pp": 2, "dp": 2, "tp": 2, "zero": 1, "micro_batch": 2}),
    "experts-deep": ("qwen3_moe", {"pp": 4, "tp": 2, "micro_batch": 4, "schedule": "zero-bubble"}),
    "unlike-stages": ("llama", {"pp": 2, "tp": [4, 2], "dp": [1, 2], "micro_batch": 1, "sp": True, "schedule": "1f1b"}),
    "unlike-stages-context": (
        "llama", {"pp": 2, "cp": [2, 1], "dp": [1, 4], "tp": [2, 1], "micro_batch": 1, "zero": 1, "schedule": "1f1b"}),
    "unlike-stages-tied": ("gpt2", {"pp": 2, "dp": [2, 4], "tp": [2, 1], "micro_batch": 1, "zero": 0}),
    "unlike-stages-zero3": (
        "gpt2", {"pp": 4, "dp": [1, 2, 2, 1], "tp": [2, 1, 1, 2], "micro_batch": 2, "zero": 3, "recompute": "full"}),
    "images-zero2": ("resnet", {"pp": 2, "dp": 4, "zero": 2, "micro_batch": 2}),
}  # fmt: skip
QUICK = {("resnet", "pp4-dp2")}
UNLIKE = ("t5", "resnet")  # between whose stages not always the same goes


def cases() -> Iterator[Any]:
    """(family, pin): what is not quick is marked slow."""
    for family in DEEP:
        for name, pin in (OF_IMAGES if family == "resnet" else PIPELINES).items():
            marks = () if (family, name) in QUICK else (pytest.mark.slow,)
            yield pytest.param(family, pin, marks=marks, id=f"{family}-{name}")
    for name, (family, pin) in MIXED.items():
        yield pytest.param(family, pin, marks=(pytest.mark.slow,), id=f"{family}-{name}")


@pytest.mark.parametrize(("family", "pin"), list(cases()))
def test_trains_as_on_one_device(family: str, pin: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, all gradients, and parameters after three steps; and it sends what its plan pays for."""
    monkeypatch.setattr(autopar.api, "trace", lambda model, call: widened(trace(model, call)))
    model, call = DEEP[family](LAYERS)()
    asked = planned(family, pin)
    plan = Plan.loads(asked.dumps())
    assert isinstance(plan, StagedPlan)
    assert all(plan.layout_keys[key] == value for key, value in pin.items())
    made = assert_trains_alike(model, call, plan)
    assert_sends_what_is_paid_for(asked, made, alike=family not in UNLIKE)


def planned(family: str, pin: dict[str, Any]) -> StagedPlan:
    """The plan of a row."""
    model, call = DEEP[family](LAYERS)()
    plan = autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=RANKS), example_inputs=call, pin=pin)
    assert isinstance(plan, StagedPlan)
    return plan


def test_a_tied_tensor_parallel_model_sends_what_its_plan_pays_for() -> None:
    """A tied parameter is reduced by both of its stages, and a gradient that the next stage takes both as summands and
    as their sum goes there once."""
    (model, call), plan = DEEP["gpt2"](LAYERS)(), planned("gpt2", PIPELINES["pp2-dp2-tp2"])
    made = staged_program(
        model, call, plan, lambda one: trace(model, one), autopar.api._plan_trace, lambda make: make()
    )
    assert_sends_what_is_paid_for(plan, made, alike=True)
