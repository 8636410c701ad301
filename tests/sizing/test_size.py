"""Sizing against solving every size, and its rows against planning and predicting them anew."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import autopar
from autopar.choosing.search import LayoutSearch
from autopar.choosing.space import Space
from autopar.errors import AutoparError, ClusterSpecError, Infeasible
from autopar.predicting import predict
from autopar.predicting.predict import Prediction, Predictor
from autopar.sizing.frontier import TOLERANCE
from autopar.sizing.types import Row, Sizing
from autopar.trace import trace_sample
from tests.choosing.test_search import SEQ, model

BATCH, CLUSTERS, MOST = 24, ("h100-sxm", "a100-80g"), 32
TARGET = "100B tokens in 6 days"
SAMPLES: dict[str, Any] = {}
MEMORY = 6 << 30  # so that small sizes must recompute, and the smallest do not fit


@pytest.fixture(autouse=True)
def one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model and sequence everywhere: traced once."""
    monkeypatch.setattr(predict, "trace_sample", lambda traced, call, precision, as_written: sample(precision, call))


def sample(precision: str, call: Any) -> Any:
    if precision not in SAMPLES:
        SAMPLES[precision] = trace_sample(model(), call, precision=precision)
    return SAMPLES[precision]


@cache
def sized(target: str, **options: Any) -> Sizing:
    given = {"clusters": CLUSTERS, "max_gpus": MOST, "memory_limit_bytes": MEMORY, **options}
    return autopar.size(model(), target, seq=SEQ, global_batch=BATCH, **given)


@cache
def every_size(cluster: str) -> dict[int, Prediction]:
    """The best of every size, solved apart."""
    found = {}
    for gpus in (*range(1, 8), *range(8, MOST + 1, 8)):
        spec = autopar.ClusterSpec.preset(cluster, gpus=gpus)
        of = traced(cluster).on(spec)
        of.forget_prices()
        try:
            found[gpus] = LayoutSearch(of, Space.of(of, {})).run(60).best
        except Infeasible:
            continue
    return found


@cache
def traced(cluster: str) -> Predictor:
    spec = autopar.ClusterSpec.preset(cluster, gpus=8)
    return Predictor(model(), spec, seq=SEQ, global_batch=BATCH, memory_limit_bytes=MEMORY)


def costs(found: dict[int, Prediction], longest_s: float) -> list[float]:
    return [n * p.step_time_s for n, p in found.items() if p.step_time_s <= longest_s and p.layout.devices == n]


@pytest.mark.slow
@pytest.mark.parametrize("target", [TARGET, "step in 300 ms", "step in 35 ms", "20B tokens in 1 day under $3k"])
def test_answers_are_those_of_solving_every_size(target: str) -> None:
    found = sized(target)
    longest_s = found.goal.longest_step_s
    for one in found.clusters:
        every = every_size(one.name)

        def admits(best: Prediction, gpus: int, one: Any = one) -> bool:
            usd = found.goal.usd(gpus * best.step_time_s, one.price_per_hour_usd)
            return found.goal.admits(best.step_time_s, usd)

        meeting = [n for n, best in every.items() if best.layout.devices == n and admits(best, n)]
        if not meeting:
            assert one.fewest is None and one.why
            continue
        assert one.fewest is not None and one.cheapest is not None and one.fastest is not None
        assert one.fewest_proven
        assert one.fewest.gpus == min(meeting)
        cheapest = min(n * every[n].step_time_s for n in meeting)
        assert cheapest <= one.cheapest.device_s * (1 + 1e-12) <= cheapest / (1 - TOLERANCE)
        assert cheapest >= one.cheapest.device_s * (1 - one.cheaper_by) * (1 - 1e-12)
        assert one.fastest.step_time_s <= min(every[n].step_time_s for n in meeting) / (1 - TOLERANCE)
        assert all(row.step_time_s <= longest_s for row in one.rows)
        assert one.searches <= one.sizes


def test_every_row_is_planned_and_predicted_again_to_the_same_number() -> None:
    rows = [row for one in sized(TARGET).clusters for row in one.rows]
    assert {row.cluster for row in rows} == set(CLUSTERS)
    for row in rows:
        spec = autopar.ClusterSpec.preset(row.cluster, gpus=row.gpus)
        of = traced(row.cluster).on(spec)  # traced apart, on a cluster of another size
        of.forget_prices()
        assert of.predict(str(row.layout)).step_time_s == row.step_time_s
        pin = {key: value for key, value in row.layout.to_dict().items() if value is not None}
        again = LayoutSearch(of, Space.of(of, pin)).run(60).best
        assert (again.layout, again.step_time_s, again.peak_bytes) == (row.layout, row.step_time_s, row.peak_bytes)
        assert again.mfu == row.mfu
    row = rows[0]
    fresh = autopar.predict(
        model(), autopar.ClusterSpec.preset(row.cluster, gpus=row.gpus), row.layout, seq=SEQ, global_batch=BATCH
    )
    assert isinstance(fresh, Prediction)
    assert fresh.step_time_s == row.step_time_s


def test_figures_of_a_row_agree() -> None:
    found = sized(TARGET)
    for one in found.clusters:
        for row in one.rows:
            assert one.price_per_hour_usd is not None
            assert row.run_s == pytest.approx(row.step_time_s * math.ceil(100e9 / (BATCH * SEQ)))
            assert row.usd == pytest.approx(row.gpus * row.run_s / 3600 * one.price_per_hour_usd)
            assert row.per_s * row.step_time_s == pytest.approx(BATCH * SEQ)
            assert row.run_s <= 6 * 86400
            assert row.peak_bytes <= MEMORY


def test_the_front_has_what_nothing_beats_and_nothing_else() -> None:
    found = sized(TARGET)
    every = [row for one in found.clusters for row in one.rows]
    front = found.pareto
    assert [row.step_time_s for row in front] == sorted((row.step_time_s for row in front), reverse=True)
    assert [row.usd for row in front] == sorted(row.usd or 0 for row in front)
    for row in every:
        beaten = any(o.step_time_s <= row.step_time_s and o.usd <= row.usd and o != row for o in every)  # type: ignore[operator]
        assert (row in front) != beaten


def row(cluster: str, step: float, device: float, usd: float | None) -> Row:
    return Row(cluster, 8, autopar.Layout(), step, 1.0, 0.5, 1, step, usd, device)


def test_without_a_price_rows_compete_within_their_cluster() -> None:
    assert row("a", 1.0, 8.0, 1.0).beats(row("b", 1.0, 4.0, 2.0))
    assert not row("a", 1.0, 8.0, 1.0).beats(row("b", 2.0, 16.0, None))
    assert row("b", 1.0, 8.0, None).beats(row("b", 2.0, 8.0, None))
    assert not row("b", 1.0, 8.0, None).beats(row("b", 1.0, 8.0, None))


def test_a_limit_on_time_is_held_and_said() -> None:
    with pytest.raises(Infeasible, match="time limit"):
        sized(TARGET, time_limit_s=1e-9)


@pytest.mark.slow
def test_a_target_out_of_reach_says_how_close_and_what_helps() -> None:
    with pytest.raises(Infeasible) as caught:
        sized("100B tokens in 12 hours", clusters=("a100-80g",))
    text = str(caught.value)
    assert "no cluster reaches '100B tokens in 12 hours' with a global batch of 24 samples" in text
    assert "a100-80g: the fastest step is" in text and "times the" in text
    batch = int(text.split("a global batch of ")[2].split(";")[0].split(",")[0])
    assert batch > BATCH
    with pytest.raises(Infeasible):
        autopar.size(
            model(), "100B tokens in 12 hours", seq=SEQ, global_batch=batch // 2, clusters=("a100-80g",),
            max_gpus=MOST, memory_limit_bytes=MEMORY,
        )  # fmt: skip
    helped = autopar.size(
        model(), "100B tokens in 12 hours", seq=SEQ, global_batch=batch, clusters=("a100-80g",), max_gpus=MOST,
        memory_limit_bytes=MEMORY,
    )  # fmt: skip
    assert helped.clusters[0].fewest is not None


def test_a_budget_out_of_reach_says_which_one_would_do() -> None:
    with pytest.raises(Infeasible, match=r"times the budget.*a budget of [0-9.,]+ USD"):
        sized("100B tokens for 100 USD", clusters=("h100-sxm",))


def test_what_fits_nowhere_says_so() -> None:
    with pytest.raises(Infeasible, match="nothing fits on up to 32 GPUs"):
        sized(TARGET, clusters=("h100-sxm",), memory_limit_bytes=1 << 27)


def test_a_budget_needs_a_price() -> None:
    with pytest.raises(ClusterSpecError, match=r"the price of mi300x is not known; give it: --price mi300x=USD"):
        sized("1T tokens under $5M", clusters=("mi300x",))


def test_nonsense_is_refused_before_the_trace() -> None:
    with pytest.raises(AutoparError, match="target 'soon'"):
        autopar.size(None, "soon", global_batch=8)  # type: ignore[arg-type]


def test_as_json_and_as_a_page(tmp_path: Path) -> None:
    found = sized(TARGET)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [one["cluster"] for one in data["clusters"]] == list(CLUSTERS)
    assert len(data["pareto"]) == len(found.pareto)
    assert data["clusters"][0]["fewest"]["layout"]["dp"] >= 1
    found.to_html(tmp_path / "sizing.html")
    page = (tmp_path / "sizing.html").read_text(encoding="utf-8")
    assert page.count("<circle") == len(found.pareto) + len({r.cluster for r in found.pareto})
    assert page.count("<code>") == len(found.pareto)
    assert "http://" not in page and "https://" not in page and "<script" not in page
    with pytest.raises(AutoparError, match="nothing was changed"):
        found.to_html(tmp_path / "no" / "sizing.html")


def test_the_text_has_the_answers() -> None:
    found = sized(TARGET)
    text = str(found)
    for one in found.clusters:
        assert one.fewest is not None and f"{one.fewest.gpus:,} GPUs" in text
    assert text.count("micro_batch=") == min(14, len(found.pareto))
