"""Plans by degrees: when they are made, what they say, and what becomes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import autopar
from autopar.choosing.crowded import crowded, kept_bytes
from autopar.choosing.report import LayoutReport
from autopar.errors import AutoparError, Infeasible, LayoutError, PinError, PlanError, PlanMismatch
from autopar.models import example_inputs
from autopar.plans import Plan
from autopar.staged import StagedPlan
from autopar.trace import trace
from tests.choosing.test_search import SEQ, model

NODES = autopar.ClusterSpec.preset("h100-sxm", gpus=16)
PIPELINE = {"pp": 2, "tp": 2, "zero": 1}


@cache
def made() -> StagedPlan:
    found = autopar.plan(model(), NODES, seq=SEQ, global_batch=16, pin=PIPELINE)
    assert isinstance(found, StagedPlan)
    return found


def test_is_what_predict_says() -> None:
    plan = made()
    assert {key: plan.layout()[key] for key in PIPELINE} == PIPELINE
    used = NODES.part(plan.named.devices)
    guess = autopar.predict(model(), used, plan.named, seq=SEQ, global_batch=16)
    assert not isinstance(guess, list)
    summary = plan.to_summary()
    for key in ("step_time_s", "peak_bytes", "fits"):
        assert summary[key] == pytest.approx(guess.to_dict()[key], rel=1e-10), key
    for key in ("tokens_per_s_per_gpu", "mfu", "hfu"):  # of all devices, idle ones too
        assert summary[key] * NODES.devices == pytest.approx(guess.to_dict()[key] * used.devices, rel=1e-10), key
    assert summary["gap"] == 0
    assert sum(plan.blocks) == 6
    assert plan.mesh == (plan.named.dp, 1, 2)


def test_fewer_samples_than_devices() -> None:
    """Then data parallelism does not fill the cluster, and the free plan is no slower than any layout that does."""
    free = autopar.plan(model(), NODES, seq=SEQ, global_batch=4)
    assert isinstance(free, StagedPlan)
    named = autopar.predict(model(), NODES, ["tp=4", "tp=4,pp=4,dp=1", "pp=4,tp=2,dp=2"], seq=SEQ, global_batch=4)
    assert isinstance(named, list)
    assert free.objective_s <= min(p.step_time_s for p in named if p.fits)


@pytest.mark.parametrize(
    ("pin", "gpus"), [({"pp": 1}, 16), ({"cp": 1, "tp": 2, "dp": 8}, 16), ({"lm_head.weight": ["S(0)"]}, 16), ({}, 8)]
)
def test_plans_op_by_op_stay(pin: dict[str, Any], gpus: int) -> None:
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=gpus)
    found = autopar.plan(tiny(), cluster, seq=16, global_batch=16, pin=pin or None)
    assert not isinstance(found, StagedPlan)
    assert found.decisions.nodes


def test_more_samples_than_fit_at_once() -> None:
    """No plan of the whole batch fits a rank's memory; several micro-batches do, and nothing has to be pinned."""
    traced = trace(model(), example_inputs(model(), 1024, SEQ))
    limit = int(0.15 * kept_bytes(traced) / NODES.devices)
    assert crowded(traced, NODES, limit) and not crowded(traced, NODES, 10 * limit)
    free = autopar.plan(model(), NODES, seq=SEQ, global_batch=1024, memory_limit_bytes=limit)
    assert isinstance(free, StagedPlan)
    assert free.micro_batches > 1 and free.predicted["peak_bytes"] <= limit
    assert free.bound_s <= free.objective_s and free.named.pp * free.named.cp == 1
    guess = autopar.predict(model(), NODES, free.named, seq=SEQ, global_batch=1024)  # from a trace of its own
    assert not isinstance(guess, list)
    assert guess.step_time_s == pytest.approx(free.objective_s, rel=1e-10)
    assert guess.peak_bytes == free.predicted["peak_bytes"]


def test_a_pinned_micro_batch() -> None:
    """One sample at a time on every data rank: gradients are accumulated, and are those of the whole batch."""
    cluster = autopar.ClusterSpec.preset("cpu", gpus=2)
    small = tiny().double()
    plan = autopar.plan(small, cluster, seq=16, global_batch=8, pin={"micro_batch": 1, "dp": 2})
    assert isinstance(plan, StagedPlan) and plan.micro_batches == 4 and plan.named.pp == 1
    autopar.verify(small, plan)
    with pytest.raises(PinError, match=r"lm_head.weight.*does not go with micro_batch"):
        autopar.plan(small, cluster, seq=16, global_batch=8, pin={"micro_batch": 1, "lm_head.weight": ["R"]})


def tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=64, max_position_embeddings=16, use_cache=False,
        )
    )  # fmt: skip


def test_file_and_back(tmp_path: Path) -> None:
    plan, path = made(), tmp_path / "plan.json"
    plan.save(path)
    loaded = Plan.load(path)
    assert isinstance(loaded, StagedPlan)
    assert loaded == plan
    assert loaded.dumps() == plan.dumps()


def broken(**changes: Any) -> str:
    data = json.loads(made().dumps())
    for key, value in changes.items():
        (data["staged"] if key in data["staged"] else data)[key] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": [6]}, "expected one count for each of 2 ranks"),
        ({"blocks": [7, -1]}, "must not be negative"),
        ({"mesh": [2, 2, 2]}, "is not that of the layout"),
        ({"roles": ["dp", "cp", "ep"]}, "is not that of the layout"),
        ({"layout": {"tp": 2, "pp": 0}}, "not a layout"),
        ({"layout": {"tp": 1000, "pp": 1000}}, "is not that of the layout|expected one count"),
        ({"others": [{"layout": {"xp": 1}, "step_time_s": 1.0, "peak_bytes": 1}]}, "not a layout"),
        ({"others": [{"layout": {"tp": 1}, "step_time_s": "fast", "peak_bytes": 1}]}, "wrong type"),
        ({"counts": {"cells": "many"}}, "expected whole numbers"),
        ({"staged": []}, "wrong type"),
        ({"autopar_plan": 5}, "newer autopar"),
    ],
)
def test_corrupt_files(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.loads(broken(**changes))


def test_what_cannot_be_run_yet() -> None:
    for changes, message in (
        ({"dp": 2, "cp": 2, "ep": 4}, r"\(ep=4, cp=2, dp=2\) cannot be run yet.*; pin ep=2, a divisor of dp, or 1"),
        ({}, "ranks without work cannot be run yet; plan for a cluster of"),
    ):
        plan = replace(made(), layout_keys={**made().layout_keys, **changes})
        with pytest.raises(AutoparError, match=message):
            autopar.compile(model(), NODES, plan=plan)


@pytest.mark.parametrize(
    ("pin", "error", "message"),
    [
        ({"pp": 2, "lm_head.weight": ("R",)}, PinError, "does not go with pp"),
        ({"pp": 7}, Infeasible, "no layout satisfies the pins"),
        ({"pp": "two"}, LayoutError, "pp=two"),
        ({"pp": 2, "dp": 3}, Infeasible, "no layout satisfies the pins"),
    ],
)
def test_impossible_pins(pin: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        autopar.plan(model(), NODES, seq=SEQ, global_batch=16, pin=pin)


def test_report() -> None:
    report = made().explain(time_limit_s=60)
    assert isinstance(report, LayoutReport)
    text = str(report)
    assert max(map(len, text.splitlines())) <= 120
    assert len(text.splitlines()) <= 40
    for said in ("pipeline", "where time goes", "memory", "why not", "what binds", "to run it", "optimal"):
        assert said in text
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["layout"] == made().layout()
    assert data["solver"]["gap"] == 0
    for worth in data["worths"]:
        assert worth["saves_s"] >= -1e-12, worth  # more never hurts
    for other in data["alternatives"]:
        assert other["extra_s"] is None or other["extra_s"] >= -1e-12, other


def test_why_not() -> None:
    report = made().explain()
    slower = report.why_not({"tp": 8})
    assert slower.extra_s is not None and slower.extra_s >= 0
    assert isinstance(slower.plan, StagedPlan)
    assert slower.plan.layout()["tp"] == 8
    assert report.why_not({"tp": 3}).outcome == "impossible"
    with pytest.raises(AutoparError, match="why_not needs layout keys"):
        report.why_not({"lm_head.weight": ("R",)})


def test_a_loaded_plan_is_explained_again(tmp_path: Path) -> None:
    loaded = Plan.loads(made().dumps())
    assert "plan.explain(model)" in str(loaded.explain())
    with pytest.raises(AutoparError, match="loaded without its model"):
        loaded.explain().why_not({"tp": 8})
    again = loaded.explain(model())
    assert again.why_not({"tp": 8}).plan is not None
    with pytest.raises(PlanMismatch, match="another model"):
        loaded.explain(tiny())


def test_too_little_memory() -> None:
    with pytest.raises(Infeasible, match=r"the leanest needs .* short by .* any one of: ") as caught:
        autopar.plan(model(), NODES, seq=SEQ, global_batch=16, pin=PIPELINE, memory_limit_bytes=1 << 28)
    assert caught.value.fixes


PLAN_IT = """
import sys
import autopar
from tests.choosing.test_plan import NODES, SEQ, model
sys.stdout.write(autopar.plan(model(), NODES, seq=SEQ, global_batch=4).dumps())
"""


def test_the_same_bytes_from_other_processors() -> None:
    """Fewer vector units, another BLAS kernel, another number of threads: numpy then sums in another order."""
    others = [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "2", "OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX2 FMA3"},
    ]
    texts = []
    for changed in others:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **changed}
        done = subprocess.run([sys.executable, "-c", PLAN_IT], env=env, capture_output=True, text=True, check=True)
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert isinstance(Plan.loads(texts[0]), StagedPlan)


def test_files_of_version_2_are_read() -> None:
    """Before layouts said what waits on the host."""
    layout = {key: value for key, value in made().layout_keys.items() if key != "offload"}
    assert Plan.loads(broken(autopar_plan=2, layout=layout)).named == made().named  # type: ignore[attr-defined]
