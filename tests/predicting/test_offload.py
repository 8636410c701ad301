"""Layouts with the optimizer's state on the host: what it saves and costs, where it is refused, where it is advised."""

from __future__ import annotations

from dataclasses import replace

import pytest

import autopar
from autopar.choosing.search import LayoutSearch
from autopar.choosing.space import Space
from autopar.errors import Infeasible, LayoutError
from autopar.layout_text import short
from autopar.layouts import Layout, parse_layout
from autopar.predicting.predict import Predictor
from autopar.simulating.costs import HOST_LINK
from autopar.staged import StagedPlan
from tests.choosing.test_search import SEQ, everything, model, predictor


@pytest.mark.parametrize("text", ["tp=2,zero=0", "pp=2,zero=1", "zero=3"])
def test_time_and_memory_follow_from_the_state(text: str) -> None:
    of = predictor(8, batch=24)
    kept, away = (of.predict(parse_layout(f"{text},{more}", 8)) for more in ("offload=none", "offload=optimizer"))
    job = of.job(away.layout)
    on_host = max(job.host_bytes(stage) for stage in of.stages(away.layout))
    link = of.cluster.device.host_link_bytes_per_s
    assert away.step_time_s - kept.step_time_s == pytest.approx(2 * on_host / link, rel=1e-9)
    assert away.breakdown["offload_s"] == pytest.approx(2 * on_host / link, rel=1e-12)
    assert kept.breakdown["offload_s"] == 0.0
    saved = kept.breakdown["memory_bytes"]["optimizer"] - away.breakdown["memory_bytes"]["optimizer"]
    assert 0 < saved < on_host  # one part of the model at a time is on the device
    assert away.peak_bytes < kept.peak_bytes


def test_a_faster_link_is_never_slower() -> None:
    of, layout = predictor(8, batch=24), parse_layout("zero=1,offload=optimizer", 8)
    times = []
    for factor in (1, 2, 10):
        link = factor * of.cluster.device.host_link_bytes_per_s
        there = of.on(replace(of.cluster, device=replace(of.cluster.device, host_link_bytes_per_s=link)))
        there.forget_prices()
        times.append(there.predict(layout).step_time_s)
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


def linked(of: Predictor, link: float, host: int) -> Predictor:
    device = replace(of.cluster.device, host_link_bytes_per_s=link)
    return of.on(replace(of.cluster, device=device, host_memory_bytes=host))


def test_where_there_is_no_link_or_no_room_it_is_refused() -> None:
    of = predictor(8, batch=24)
    for there in (linked(of, 0.0, 1 << 40), linked(of, 1e10, 1 << 20)):
        with pytest.raises(LayoutError, match="host_link_bytes_per_s"):
            there.predict("offload=optimizer")
    with pytest.raises(LayoutError, match="offload"):
        of.predict("offload=everything")


def test_words() -> None:
    layout = parse_layout("tp=2,offload=optimizer", 8)
    assert "offload=optimizer" in short(layout) and "offload" not in short(replace(layout, offload="none"))
    assert parse_layout(short(layout), 8) == layout


def test_a_search_with_it_pinned_equals_pricing_everything() -> None:
    for gpus, limit in ((4, 1 << 30), (8, 2 << 30)):
        of = predictor(gpus, limit)
        prices = [p for part, layout in everything(of, offload="optimizer") if (p := part.price(layout)).fits]
        if not prices:
            with pytest.raises(Infeasible):
                LayoutSearch(of, Space.of(of, {"offload": "optimizer"})).run(60)
            continue
        found = LayoutSearch(of, Space.of(of, {"offload": "optimizer"})).run(60)
        assert found.best.layout.offload == "optimizer"
        assert found.best.step_time_s == pytest.approx(min(p.step_time_s for p in prices), rel=1e-12)


def test_it_is_named_where_it_would_do() -> None:
    of, layout = predictor(8, batch=24), Layout(dp=8, micro_batch=1)
    of.limit_bytes = of.price(layout).peak_bytes - (64 << 20)
    fix = next(fix for fix in of.fixes(of.price(layout)) if fix.change == {"offload": "optimizer"})
    assert str(fix).startswith("offload optimizer state (+") and "% time" in str(fix)
    assert of.predict(replace(layout, offload="optimizer")).fits


def test_it_is_chosen_where_nothing_else_fits() -> None:
    pin = {"dp": 4, "tp": 2, "pp": 1, "zero": 0}
    kept = predictor(8, batch=12)
    least = LayoutSearch(kept, Space.of(kept, {**pin, "offload": "none"})).leanest()
    assert least is not None
    for more, expected in ((-(1 << 20), "optimizer"), (4 << 30, "none")):
        of = predictor(8, int(least[1].total) + more)
        best = LayoutSearch(of, Space.of(of, pin)).run(60).best
        assert best.layout.offload == expected and best.fits
    of = predictor(8, int(least[1].total) - (1 << 20))
    with pytest.raises(Infeasible):
        LayoutSearch(of, Space.of(of, {**pin, "offload": "none"})).run(60)


def test_it_spares_recomputation_where_the_link_is_fast() -> None:
    pin = {"dp": 4, "tp": 2, "pp": 1, "zero": 0}
    of = predictor(8, 1100 << 20)
    best = LayoutSearch(of, Space.of(of, pin)).run(60).best
    assert (best.layout.offload, best.layout.recompute) == ("none", "full")
    fast = linked(of, 100 * of.cluster.device.host_link_bytes_per_s, 1 << 40)
    fast.forget_prices()
    best = LayoutSearch(fast, Space.of(fast, pin)).run(60).best
    assert (best.layout.offload, best.layout.recompute) == ("optimizer", "none")


def test_the_simulated_step_takes_as_long_and_shows_the_copies() -> None:
    from autopar.simulating.simulate import simulate_layout

    of = predictor(8, batch=24)
    layout = parse_layout("zero=1,offload=optimizer", 8)
    found = simulate_layout(of, layout)
    assert found.step_time_s == pytest.approx(of.price(layout).step_time_s, rel=0.02)
    assert {task.name for task in found.tasks if task.lane == HOST_LINK} == {"state from the host", "state to the host"}


def test_a_plan_with_it_can_be_run() -> None:
    of = predictor(8, batch=24)
    plan = autopar.plan(model(), of.cluster, seq=SEQ, global_batch=12, pin={"offload": "optimizer", "pp": 1})
    assert isinstance(plan, StagedPlan) and plan.named.offload == "optimizer"
    assert not plan.not_yet
    again = autopar.Plan.loads(plan.dumps())
    assert isinstance(again, StagedPlan) and again.named == plan.named
    assert "waits on the host" in str(plan.explain())
