"""Layouts of real models: the simulator beside the closed form, and the way to both from Python and the shell."""

from __future__ import annotations

import copy
import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest

import autopar
from autopar import cli
from autopar.layouts import Layout, parse_layout
from autopar.predicting.predict import Predictor
from autopar.predicting.work import Pricer
from autopar.prediction_text import describe
from autopar.simulating.costs import COMPUTE, CONTEXT, DATA, HOST, PIPELINE, TENSOR, StepCost
from autopar.simulating.pricing import step_cost
from autopar.simulating.schedules import BACKWARD, FORWARD, INPUTS, WEIGHTS
from autopar.simulating.simulate import simulate_layout
from autopar.simulating.simulation import simulate_cost
from tests.models import tiny_mlp
from tests.predicting.test_predict import CLUSTER, LAYERS, predictor

LAYOUTS = [
    "dp=8", "dp=8,zero=1", "dp=4,tp=2,zero=2", "tp=8", "pp=8", "dp=2,pp=4", "dp=2,pp=4,schedule=gpipe", "tp=4,pp=2",
    "dp=2,tp=2,pp=2,zero=1,recompute=full", "dp=2,pp=4,vpp=2", "tp=2,pp=4,recompute=full,recompute_blocks=1",
    "tp=2,pp=4,sp=false", "dp=2,pp=4,schedule=zero-bubble", "dp=4,pp=2,zero=3",
]  # fmt: skip


SELECTIVE = "dp=4,tp=2,recompute=selective"


@pytest.fixture(scope="module")
def priced() -> Predictor:
    return predictor("llama")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_peaks_where_it_is_priced(priced: Predictor, layout: str) -> None:
    """Uneven chunks of interleaved stages aside, to the byte."""
    found, predicted = simulate_layout(priced, layout), priced.predict(layout)
    assert found.peak_bytes == pytest.approx(predicted.peak_bytes, abs=2, rel=0.004 if "vpp" in layout else 0)


@pytest.mark.parametrize("layout", ["dp=8", "dp=8,zero=1", "dp=4,tp=2,zero=2", "tp=8", "dp=2,tp=4,recompute=full"])
def test_without_a_pipeline_both_accounts_are_one(priced: Predictor, layout: str) -> None:
    found, predicted = simulate_layout(priced, layout), priced.predict(layout)
    assert found.step_time_s == pytest.approx(predicted.step_time_s, rel=0.01)


def bare(cost: StepCost, *, even: bool) -> StepCost:
    """Without communication, launches and optimizer; even: all stages have the passes of the second one."""

    def plain(at: int) -> object:
        stage = cost.stages[1 if even else at]
        chunks = []
        for chunk in stage.chunks:
            passes = {
                kind: dataclasses.replace(
                    one, host_s=0.0, pieces=tuple(dataclasses.replace(p, messages=()) for p in one.pieces)
                )
                for kind, one in chunk.passes.items()
            }
            chunks.append(dataclasses.replace(chunk, passes=passes))
        return dataclasses.replace(stage, chunks=tuple(chunks), reductions=(), tied_s=0.0, optimizer_s=0.0)

    stages = tuple(plain(at) for at in range(len(cost.stages)))
    return dataclasses.replace(cost, stages=stages, send_s=0.0, unpack_s=0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["dp=2,pp=4", "dp=2,pp=4,schedule=gpipe", "dp=2,pp=4,vpp=2", "pp=8"])
def test_even_pipelines_are_the_closed_form(priced: Predictor, layout: str) -> None:
    """A stage's work and a bubble of (p - 1) / v micro-batches, from the kernels of a real model."""
    cost = bare(step_cost(priced, parse_layout(layout, 8)), even=True)
    p, v = len(cost.stages), len(cost.stages[0].chunks)
    work = sum(c.passes[k].seconds for c in cost.stages[0].chunks for k in (FORWARD, BACKWARD))
    found = simulate_cost(cost)
    assert found.step_time_s == pytest.approx((cost.micro_batches + (p - 1) / v) * work, rel=1e-6)
    assert found.idle_share == pytest.approx([(p - 1) / (cost.micro_batches * v + p - 1)] * p)


@pytest.mark.parametrize(
    "layout",
    ["dp=2,pp=4", "dp=2,pp=4,schedule=gpipe", "dp=2,pp=4,vpp=2", "dp=2,pp=4,schedule=zero-bubble", "pp=8", "tp=4,pp=2"],
)
def test_whole_steps_of_pipelines_are_near_the_closed_form(priced: Predictor, layout: str) -> None:
    """With all that the closed form only bounds: uneven ends, sends that hide, launches that run ahead."""
    found, predicted = simulate_layout(priced, layout), priced.predict(layout)
    assert found.step_time_s == pytest.approx(predicted.step_time_s, rel=0.05)


def test_zero_bubble_splits_the_backward_pass_by_its_products(priced: Predictor) -> None:
    """The weights' products are as many FLOPs as the forward pass of the linear layers, and nothing is lost."""
    table = priced.table
    assert table.block is not None
    back = table.block.backward
    inside = sum(float(k.flops.sum()) for k in back.weight_gradients.kernels)
    linear = sum(float(k.flops.sum()) for k in table.block.forward.kernels if k.dims is not None)
    assert inside == pytest.approx(linear, rel=0.01)
    assert len(back.weight_gradients.kernels) + len(back.input_gradients.kernels) == len(back.kernels)
    whole = step_cost(priced, Layout(pp=4, dp=2)).stages[1].chunks[0].passes[BACKWARD]
    split = step_cost(priced, Layout(pp=4, dp=2, schedule="zero-bubble")).stages[1].chunks[0].passes
    parts = [split[kind].pieces for kind in (INPUTS, WEIGHTS)]
    assert sum(p.compute_s for pieces in parts for p in pieces) == pytest.approx(sum(p.compute_s for p in whole.pieces))
    plain, bubbles = (simulate_layout(priced, f"dp=2,pp=4,schedule={s}") for s in ("1f1b", "zero-bubble"))
    assert bubbles.step_time_s < plain.step_time_s


def test_every_block_runs_once_a_pass(priced: Predictor) -> None:
    for layout in ("dp=2,pp=4", "dp=2,pp=4,vpp=2", "dp=4,pp=2,schedule=zero-bubble", "dp=8"):
        found = simulate_layout(priced, layout)
        first = [t.name for t in found.tasks if t.lane == COMPUTE and t.micro_batch == 0]
        for kind in (FORWARD, WEIGHTS if "zero" in layout else BACKWARD):
            blocks = [name for name in first if name.startswith(f"{kind}, block")]
            assert sorted(blocks) == sorted(f"{kind}, block {i}" for i in range(LAYERS))


def test_the_lanes_of_a_layout(priced: Predictor) -> None:
    found = {(t.stage, t.lane) for t in simulate_layout(priced, "dp=2,tp=2,pp=2").tasks}
    assert found == {(stage, lane) for stage in (0, 1) for lane in (COMPUTE, TENSOR, DATA, PIPELINE, HOST)}
    alone = {t.lane for t in simulate_layout(priced, "tp=8").tasks}
    assert alone == {COMPUTE, TENSOR, HOST}
    slow = autopar.ClusterSpec.preset("a100-80g", gpus=16, inter_node_gbit_per_s=1.0)  # attention hides little of it
    around = simulate_layout(variant(priced, cluster=slow), "cp=16").tasks
    assert {t.lane for t in around} == {COMPUTE, CONTEXT, DATA, HOST}


def test_selective_recomputation_is_what_the_run_says(priced: Predictor) -> None:
    """All but every other product takes longer than the core of attention; both as the closed form has it."""
    products = variant(priced)
    products.run = dataclasses.replace(priced.run, selective="products")
    products.pricer = Pricer(CLUSTER, products.run)
    seconds = []
    for made in (priced, products):
        found, predicted = simulate_layout(made, SELECTIVE), made.predict(SELECTIVE)
        assert found.step_time_s == pytest.approx(predicted.step_time_s, rel=0.02)
        seconds.append(sum(t.end_s - t.start_s for t in found.tasks if t.name.endswith("again")))
    assert seconds[0] < seconds[1]


def variant(base: Predictor, *, cluster: autopar.ClusterSpec = CLUSTER, overlap: bool = False) -> Predictor:
    """The same traced model on another cluster or in another run."""
    made = copy.copy(base)
    made.cluster, made.run = cluster, dataclasses.replace(base.run, overlap=overlap)
    made.pricer, made._stages = Pricer(cluster, made.run), {}
    return made


def test_reductions_hide_behind_the_last_backward_pass_if_the_run_overlaps_them(priced: Predictor) -> None:
    exposed, hidden = variant(priced), variant(priced, overlap=True)
    for layout in ("dp=8", "dp=4,pp=2", "dp=4,pp=2,vpp=2"):
        slow, quick = simulate_layout(exposed, layout), simulate_layout(hidden, layout)
        reduced = [sum(t.end_s - t.start_s for t in s.tasks if t.name == "reduce gradients") for s in (slow, quick)]
        assert reduced[0] == pytest.approx(reduced[1]) and quick.step_time_s < slow.step_time_s
    first = [t for t in simulate_layout(hidden, "dp=8").tasks if t.name == "reduce gradients"]
    assert len(first) > 1 and first[0].start_s < first[-1].start_s


def test_a_faster_network_never_makes_a_step_longer(priced: Predictor) -> None:
    layouts = ("dp=32", "dp=8,pp=4", "dp=32,zero=3", "dp=4,pp=8")
    steps = []
    for rate in (50.0, 100.0, 200.0, 400.0, 800.0):
        cluster = autopar.ClusterSpec.preset("a100-80g", gpus=32, inter_node_gbit_per_s=rate)
        made = variant(priced, cluster=cluster)
        steps.append([simulate_layout(made, layout).step_time_s for layout in layouts])
    for slow, quick in pairwise(steps):
        assert all(b <= a * (1 + 1e-9) for a, b in zip(slow, quick, strict=True))
    assert all(b < a for a, b in zip(steps[0], steps[-1], strict=True))


def test_from_python(priced: Predictor) -> None:
    model, call = tiny_mlp()
    alone = autopar.simulate(model, CLUSTER, "dp=8", example_inputs=call, global_batch=32)
    assert isinstance(alone, autopar.Simulation) and alone.stages == 1 and alone.ranks == 8
    with pytest.raises(autopar.LayoutError, match="stages, but the model has 8 blocks"):
        simulate_layout(priced.on(autopar.ClusterSpec.preset("a100-80g", gpus=16)), "pp=16")
    text = describe([priced.predict("dp=2,pp=4")], simulate_layout(priced, "dp=2,pp=4"))
    assert "event by event, devices idle" in text and "by stage" in text


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.json"
    argv = ["predict", "--model", "tiny-llama", "--cluster", "h100-sxm", "--gpus", "4", "--seq", "64", "--json"]
    argv += ["--global-batch", "8", "--trace", str(path), "--layout", "pp=2"]
    assert cli.main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(path.read_text())["traceEvents"]
    assert len(printed["simulation"]["idle_share_per_stage"]) == 2
    assert printed["simulation"]["step_time_s"] == pytest.approx(printed["step_time_s"], rel=0.2)
    assert cli.main([*argv, "--layout", "tp=2"]) == cli.EXIT_ERROR
    assert "--trace writes the step of one layout, found 2: keep one --layout" in capsys.readouterr().err
    assert cli.main([*argv[:-3], str(tmp_path / "nowhere" / "x"), *argv[-2:]]) == cli.EXIT_ERROR
    assert "nowhere does not exist" in capsys.readouterr().err
