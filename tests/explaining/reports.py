"""Reports that several test files look at: made once in a process."""

from __future__ import annotations

from functools import cache

import autopar
from autopar import ClusterSpec
from autopar.choosing.report import LayoutReport
from autopar.explain import Report
from autopar.explaining.guesses import PredictionReport
from autopar.models import load_model
from autopar.predicting.predict import Predictor
from tests.test_planning import free

LAYOUTS = ("pp=4,tp=2,micro_batch=1,zero=1", "tp=8,micro_batch=2", "pp=2,micro_batch=2,recompute=full")


@cache
def report() -> Report:
    """Of a plan, with what four seconds solve again."""
    return free("mlp").explain(time_limit_s=4)


@cache
def by_degrees() -> LayoutReport:
    """Of a plan with pipeline stages."""
    model, pin = load_model("tiny-llama"), {"pp": 2, "tp": 2}
    plan = autopar.plan(model, ClusterSpec.preset("h100-sxm", gpus=16), seq=64, global_batch=32, pin=pin)
    made = plan.explain(time_limit_s=20)
    assert isinstance(made, LayoutReport)
    return made


@cache
def predictor() -> Predictor:
    """Of a tiny Llama on two nodes."""
    return Predictor(load_model("tiny-llama"), ClusterSpec.preset("h100-sxm", gpus=16), seq=64, global_batch=32)


@cache
def predicted() -> PredictionReport:
    """A pipeline over two nodes, and two other layouts."""
    return PredictionReport(predictor(), [predictor().predict(layout) for layout in LAYOUTS], "tiny-llama")
