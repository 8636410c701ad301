"""Pauses of pipelines that span nodes: which layouts have them, and what they add up to."""

from __future__ import annotations

import copy

import pytest

import autopar
from autopar.predicting.pauses import pause_s
from autopar.predicting.predict import Predictor
from autopar.predicting.run import Run
from autopar.simulating.simulate import simulate_layout
from tests.predicting.test_predict import predictor

PAUSE_S = 0.3


def on(gpus: int, batch: int, **options: float) -> Predictor:
    made = copy.copy(predictor("llama").on(autopar.ClusterSpec.preset("a100-80g", gpus=gpus)))
    made.run, made.global_batch = Run(**options), batch  # type: ignore[arg-type]
    made.forget_prices()
    return made


@pytest.mark.parametrize(
    ("gpus", "layout", "batch", "paused"),
    [
        (16, "dp=4,pp=4,zero=0", 64, True),
        (16, "dp=4,pp=4,zero=1", 64, False),  # not wrapped into DistributedDataParallel
        (16, "dp=4,pp=4,zero=0", 60, False),  # 15 micro-batches
        (16, "dp=2,pp=8,zero=0", 64, False),  # two neighbours
        (32, "dp=2,tp=8,pp=2,zero=0", 64, True),  # two on different nodes
        (16, "tp=4,pp=4", 64, False),  # nobody to sum gradients with
        (8, "dp=4,pp=2,zero=0", 64, False),  # one node
        (16, "dp=16,zero=0", 256, False),  # no pipeline
        (32, "tp=16,pp=2", 4, False),  # two nodes wide
    ],
)
def test_which_layouts_pause(gpus: int, layout: str, batch: int, paused: bool) -> None:
    of = on(gpus, batch, pipeline_pause_s=PAUSE_S)
    found = of.predict(f"{layout},micro_batch=1").layout
    assert pause_s(of.job(found)) == (PAUSE_S if paused else 0)


def test_a_tensor_group_on_more_than_two_nodes_pauses() -> None:
    of = on(64, 4, pipeline_pause_s=PAUSE_S)
    of.heads = of.kv_heads = 32
    assert pause_s(of.job(of.predict("tp=32,pp=2,micro_batch=1").layout)) == PAUSE_S


@pytest.mark.parametrize(("layout", "ops"), [("dp=4,pp=4", 4), ("dp=8,pp=2", 2)])
def test_pauses_add_up(layout: str, ops: int) -> None:
    """Each send and receive of a stage, and both ways of the first micro-batch; the simulator waits as long."""
    layout, batch = f"{layout},zero=0,micro_batch=1", 128
    with_pauses, without = on(16, batch, pipeline_pause_s=PAUSE_S), on(16, batch)
    found = with_pauses.predict(layout)
    n, hops = batch // found.layout.dp, 2 * (found.layout.pp - 1)
    added = found.step_time_s - without.predict(layout).step_time_s
    assert added == pytest.approx(PAUSE_S * (n * ops + hops))
    assert simulate_layout(with_pauses, layout).step_time_s == pytest.approx(added, rel=0.1)


def test_no_run_pauses_by_default() -> None:
    assert pause_s(on(16, 64).job(on(16, 64).predict("dp=4,pp=4,zero=0,micro_batch=1").layout)) == 0
