"""Every fix that is named, applied, fits; and one step less does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autopar
from autopar.choosing.fixes import fits, grown
from autopar.choosing.free_fixes import explained
from autopar.choosing.search import LayoutSearch
from autopar.choosing.space import Space
from autopar.errors import Infeasible, LayoutError
from autopar.fixes import Fix
from autopar.layouts import RECOMPUTE, Layout
from autopar.predicting.predict import Predictor
from autopar.prediction_text import lacking as describe_lacking
from tests.choosing.test_search import LAYERS, SEQ, model, predictor

GIB = 1 << 30
MACHINES = ("nodes", "memory_limit_bytes", "cluster", "global_batch", "seq")


def applied(of: Predictor, change: Mapping[str, Any]) -> Predictor:
    """The same model after a change to all but the layout, priced anew."""
    cluster = of.cluster
    if "seq" in change:
        shorter = of.with_tokens(change["seq"])
        assert shorter is not None and shorter.table.tokens == change["seq"]
        of = shorter
    if "cluster" in change:
        cluster = autopar.ClusterSpec.preset(change["cluster"], gpus=cluster.devices)
    made = of.on(replace(cluster, nodes=change.get("nodes", cluster.nodes)))
    made.forget_prices()
    made.limit_bytes = cluster.device.usable_bytes if "cluster" in change else of.limit_bytes
    made.limit_bytes = change.get("memory_limit_bytes", made.limit_bytes)
    made.global_batch = change.get("global_batch", of.global_batch)
    return made


def layout_after(layout: Layout, fix: Fix) -> Layout:
    return replace(layout, **{k: v for k, v in fix.change.items() if k not in MACHINES})


layouts = st.builds(
    dict,
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 3]),
    micro_batch=st.sampled_from([1, 2, 3, 6]),
    zero=st.integers(0, 3),
    sp=st.booleans(),
    recompute=st.sampled_from(RECOMPUTE),
    schedule=st.sampled_from(["1f1b", "gpipe", "zero-bubble"]),
)


def named(keys: Mapping[str, Any], gpus: int) -> Layout | None:
    given = {k: v for k, v in keys.items() if k != "schedule" or keys["pp"] > 1}
    dp, rest = divmod(gpus, keys["tp"] * keys["pp"])
    try:
        found = None if rest else Layout(dp=dp, **given)
        if found is not None:
            predictor(gpus, batch=24).check(found)
    except LayoutError:
        return None
    return found


@settings(max_examples=60, deadline=None)
@given(layouts, st.sampled_from([4, 8, 24]), st.floats(0.3, 0.97))
def test_named_layouts(keys: dict[str, Any], gpus: int, share: float) -> None:
    layout = named(keys, gpus)
    if layout is None:
        return
    of = predictor(gpus, batch=24)
    of.limit_bytes = int(of.memory(layout).total * share)
    guess = of.price(layout)
    assert not guess.fits
    lacking = of.shortfall(guess)
    assert lacking.short_by_bytes == guess.peak_bytes - of.limit_bytes
    assert of.stage_memory(layout, of.stages(layout)[lacking.stage], lacking.stage) == lacking.memory
    fixes = of.fixes(guess)
    assert any("memory_limit_bytes" in fix.change for fix in fixes)
    for fix in fixes:
        there, after = applied(of, fix.change), layout_after(layout, fix)
        there.check(after)
        made = there.predict(after)
        assert made.fits, fix
        assert (made.step_time_s, made.peak_bytes) == pytest.approx((fix.step_time_s, fix.peak_bytes), rel=1e-9)
        assert fix.layout == after.to_dict()
        assert fix.devices == there.cluster.devices
        slower = made.step_time_s / there.global_batch / (guess.step_time_s / of.global_batch) - 1
        tokens = of.table.tokens / there.table.tokens  # by the token, not by the sample
        assert fix.slower == pytest.approx((1 + slower) * tokens - 1, abs=1e-9)
        assert not any(fits(*less) for less in one_step_less(of, layout, fix)), fix


def one_step_less(of: Predictor, layout: Layout, fix: Fix) -> list[tuple[Predictor, Layout]]:
    """The same kind of change, but smaller."""
    change, found = fix.change, []
    if "memory_limit_bytes" in change:
        return [(applied(of, {"memory_limit_bytes": change["memory_limit_bytes"] - 1}), layout)]
    if "nodes" in change:
        for nodes in range(of.cluster.nodes + 1, change["nodes"]):
            there = applied(of, {"nodes": nodes})
            for name in ("dp", "tp", "pp", "cp"):
                more, rest = divmod(getattr(layout, name) * nodes, of.cluster.nodes)
                if not rest and not (name == "pp" and layout.pp == 1):
                    found.append((there, replace(layout, **{name: more})))
        return found
    if "global_batch" in change:
        share = layout.dp * layout.micro_batch
        return [(applied(of, {"global_batch": b}), layout)
                for b in range(change["global_batch"] + share, of.global_batch, share)]  # fmt: skip
    if "cluster" in change:
        least = autopar.ClusterSpec.preset(change["cluster"]).device.usable_bytes
        assert of.cluster.device.usable_bytes < least
        return []
    if set(change) == {"micro_batch"}:
        return [(of, replace(layout, micro_batch=m)) for m in range(change["micro_batch"] + 1, layout.micro_batch)]
    if set(change) == {"zero"}:
        return [(of, replace(layout, zero=z)) for z in range(layout.zero + 1, change["zero"])]
    if fix.layout["recompute"] == "full" and "pp" not in change and "tp" not in change and "cp" not in change:
        most = max(s.blocks for s in of.stages(layout))
        blocks = fix.layout["recompute_blocks"] or most
        return [(of, replace(layout, recompute="full", recompute_blocks=k)) for k in range(1, blocks)]
    return found


@settings(max_examples=15, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "tp": st.sampled_from([1, 2]),
            "zero": st.sampled_from([0, 1]),
            "micro_batch": st.sampled_from([2, 6, 12]),
            "recompute": st.sampled_from(["none", "selective"]),
            "pp": st.sampled_from([1, 2]),
        },
    ),
    st.floats(0.7, 0.999),
)
def test_searches_in_which_nothing_fits(pin: dict[str, Any], share: float) -> None:
    of = predictor(8)
    leanest = LayoutSearch(of, Space.of(of, pin)).leanest()
    assert leanest is not None
    of.limit_bytes = int(leanest[1].total * share)
    error = answer(of, pin)
    assert error.needed_bytes is not None
    assert error.short_by_bytes == round(leanest[1].total) - of.limit_bytes
    assert any("memory_limit_bytes" in fix.change for fix in error.fixes)
    for fix in error.fixes:
        there, pins = applied(of, fix.change), {**pin, **{k: v for k, v in fix.change.items() if k not in MACHINES}}
        made = there.on(there.cluster.part(Layout(**fix.layout).devices)).predict(Layout(**fix.layout))
        assert made.peak_bytes <= there.limit_bytes, fix
        assert made.step_time_s == pytest.approx(fix.step_time_s, rel=1e-9)
        assert {k: fix.layout[k] for k in pins} == pins
        assert LayoutSearch(there, Space.of(there, pins)).run(60).best.step_time_s <= fix.step_time_s * (1 + 1e-9)
        if "nodes" in fix.change and fix.change["nodes"] > of.cluster.nodes + 1:
            fewer = applied(of, {"nodes": fix.change["nodes"] - 1})
            with pytest.raises(Infeasible):
                LayoutSearch(fewer, Space.of(fewer, pins)).run(60)


def answer(of: Predictor, pin: Mapping[str, Any]) -> Infeasible:
    with pytest.raises(Infeasible) as caught:
        LayoutSearch(of, Space.of(of, pin)).run(60)
    return explained(caught.value, of, pin, 60)


def test_what_a_person_reads() -> None:
    of = predictor(16, batch=96)
    layout = Layout(dp=8, pp=2, micro_batch=12)
    of.limit_bytes = int(of.memory(layout).total * 0.9)
    guess = of.predict(layout)
    whats = [str(fix) for fix in of.fixes(guess)]
    for start in (
        "micro_batch 12 to ",
        "recompute=full, recompute_blocks=",
        "zero 0 to 1 (",
        "dp 8 to 4, pp 2 to 4",
        "1 more node",
    ):
        assert any(w.startswith(start) for w in whats), (start, whats)
    assert any("% time)" in w for w in whats if w.startswith("recompute")), whats
    assert any(w.startswith("a memory limit of ") and w.endswith("(the device has as much)") for w in whats), whats
    lacking = str(of.shortfall(guess))
    assert lacking.startswith("short by ")
    assert " on stage 1, in the backward pass of what comes after the blocks (" in lacking
    assert "activations " in lacking
    said = describe_lacking(of.shortfall(guess), of.fixes(guess)).splitlines()
    assert said[0] == f"does not fit       {lacking}"
    assert [line.strip().rpartition(", ")[0] for line in said[2:]] == whats


def test_shorter_sequences() -> None:
    """One sample at a time is too long: half of it fits, the same as if it were traced that way from the start."""
    net, cluster, layout = model(), autopar.ClusterSpec.preset("h100-sxm", gpus=8), Layout(dp=8, micro_batch=1)
    of, half = (Predictor(net, cluster, seq=seq, global_batch=24) for seq in (SEQ, SEQ // 2))
    of.limit_bytes = math.ceil(half.memory(layout).total)
    fix = next(fix for fix in of.fixes(of.predict(layout)) if "seq" in fix.change)
    assert (fix.change, fix.what) == ({"seq": SEQ // 2}, f"sequences of {SEQ // 2} tokens instead of {SEQ}")
    assert fix.step_time_s == pytest.approx(half.predict(layout).step_time_s, rel=1e-9)
    error = answer(of, {"dp": 8, "micro_batch": 1, "recompute": "none", "zero": 0, "offload": "none", "tp": 1})
    assert any(fix.change == {"seq": SEQ // 2} for fix in error.fixes)


def test_another_device() -> None:
    """A device of 40 GiB is too small: the one with the least memory that is enough is named, and how much it takes."""
    of = predictor(8, 0, 8 * 360, "a100-40g")
    of.limit_bytes = of.cluster.device.usable_bytes
    guess = of.predict(Layout(dp=8, micro_batch=360))
    other = next(fix for fix in of.fixes(guess) if "cluster" in fix.change)
    there = applied(of, other.change)
    assert there.predict(guess.layout).fits
    for name in ("a100-pcie", "a100-80g", "h100-sxm", "h200"):
        smaller = autopar.ClusterSpec.preset(name).device.usable_bytes
        assert smaller < guess.peak_bytes or smaller >= there.limit_bytes
    assert any(w.startswith("devices with ") for w in map(str, of.fixes(guess)))
    error = answer(of, {"dp": 8, "micro_batch": 360, "recompute": "none"})
    assert any("cluster" in fix.change for fix in error.fixes)


def test_the_message_of_a_search() -> None:
    of, pin = predictor(8), {"tp": 2, "recompute": "none"}
    leanest = LayoutSearch(of, Space.of(of, pin)).leanest()
    assert leanest is not None
    of.limit_bytes = int(leanest[1].total * 0.95)
    error = answer(of, pin)
    assert str(error).startswith("no layout fits ")
    for said in (" per device: the leanest needs ", ", short by ", "; any one of: ", " instead of ", " (step "):
        assert said in str(error)
    assert "\n" not in str(error)
    assert error.to_dict()["fixes"] == [fix.to_dict() for fix in error.fixes]


def test_a_layout_that_fits_has_no_fixes() -> None:
    of = predictor(8)
    assert of.fixes(of.predict("tp=2,micro_batch=1")) == ()


def test_pins_that_contradict_are_not_fixed() -> None:
    error = answer(predictor(16), {"pp": 7})
    assert error.fixes == ()
    assert "remove a pin" in str(error)


def test_no_time_no_fixes() -> None:
    of = predictor(8, 1 << 28)
    with pytest.raises(Infeasible) as caught:
        LayoutSearch(of, Space.of(of, {})).run(60)
    assert explained(caught.value, of, {}, 0.0).fixes == ()
    assert "use more devices" in str(explained(caught.value, of, {}, 0.0))


def test_a_cluster_of_unknown_network_does_not_grow() -> None:
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=8)
    assert grown(cluster, 16) is not None
    assert grown(replace(cluster, links=cluster.links[:1]), 16) is None


@pytest.mark.slow
def test_the_whole_way_from_scratch() -> None:
    """Fixes hold where the model is traced again for the changed cluster, too."""
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=8)
    layout, limit = Layout(dp=4, pp=2, micro_batch=3), 3 * GIB
    of = Predictor(model(), cluster, seq=SEQ, global_batch=24, memory_limit_bytes=limit)
    for fix in of.fixes(of.predict(layout)):
        change = fix.change
        there = autopar.ClusterSpec.preset(change.get("cluster", "h100-sxm"), gpus=fix.devices)
        allowed = None if "cluster" in change else change.get("memory_limit_bytes", limit)
        batch = change.get("global_batch", 24)
        made = autopar.predict(
            model(), there, fix.layout, seq=SEQ, global_batch=batch, memory_limit_bytes=allowed
        )  # fmt: skip
        assert not isinstance(made, list)
        assert made.fits, fix
    assert LAYERS > 1
