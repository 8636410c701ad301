"""The search over layouts against pricing every layout, and what must hold of its answers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import autopar
from autopar.choosing.bounds import GroupCosts, cell_bounds_s
from autopar.choosing.search import LayoutChoice, LayoutSearch
from autopar.choosing.space import Space
from autopar.errors import Infeasible, LayoutError, PinError
from autopar.layouts import Layout
from autopar.predicting.predict import Predictor

LAYERS, SEQ = 6, 512
LIMITS = (2 << 30, 3 << 30, 5 << 30, 80 << 30)


def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=4096, max_position_embeddings=SEQ, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).train()


@cache
def traced() -> Predictor:
    return Predictor(model(), autopar.ClusterSpec.preset("h100-sxm", gpus=8), seq=SEQ, global_batch=12)


def predictor(gpus: int = 8, limit: int = 80 << 30, batch: int = 12, preset: str = "h100-sxm") -> Predictor:
    made = traced().on(autopar.ClusterSpec.preset(preset, gpus=gpus))
    made.limit_bytes, made.global_batch = limit, batch
    made.forget_prices()
    return made


def choose(of: Predictor, **pin: Any) -> LayoutChoice:
    return LayoutSearch(of, Space.of(of, pin)).run(60)


def everything(of: Predictor, **pin: Any) -> Iterator[tuple[Predictor, Layout]]:
    """Every layout of the space with every recomputation, on the host or not, whether it fits or not."""
    space = Space.of(of, pin)
    for group in space.groups():
        for pp, dp in zip(*space.cells(group), strict=True):
            for leaf in space.leaves(group, int(pp), int(dp)):
                part = of.on(of.cluster.part(leaf.devices))
                for one in (replace(leaf, offload=offload) for offload in space.offloads):
                    yield part, one
                    for blocks in range(1, max(s.blocks for s in part.stages(leaf))):
                        yield part, replace(one, recompute="full", recompute_blocks=blocks)
                    yield part, replace(one, recompute="full")


@pytest.mark.parametrize(
    ("gpus", "limit"), [*((4, limit) for limit in LIMITS), (8, LIMITS[1]), (16, LIMITS[0]), (16, LIMITS[3])]
)
def test_equals_pricing_everything(gpus: int, limit: int) -> None:
    of = predictor(gpus, limit)
    prices = [p for part, layout in everything(of) if (p := part.price(layout)).fits]
    if not prices:
        with pytest.raises(Infeasible):
            choose(of)
        return
    found = choose(of)
    assert found.best.step_time_s == pytest.approx(min(p.step_time_s for p in prices), rel=1e-12)
    assert found.gap == 0
    assert found.best.peak_bytes <= limit
    assert found.priced < len(prices)


@pytest.mark.parametrize("pin", [{}, {"pp": 6, "tp": 1, "cp": 1}, {"dp": 2, "pp": 4, "tp": 2}, {"micro_batch": 2}])
def test_just_enough_memory(pin: dict[str, Any]) -> None:
    """Whatever needs least memory is found where the limit is just that: no cell is left out for lack of memory."""
    of = predictor(16)
    least = min(part.memory(layout).total for part, layout in everything(of, **pin))
    assert choose(predictor(16, math.ceil(least)), **pin).best.peak_bytes == pytest.approx(least, abs=1)
    with pytest.raises(Infeasible) as caught:
        choose(predictor(16, math.ceil(least) - 2), **pin)
    assert caught.value.needed_bytes == math.ceil(least)


@pytest.mark.parametrize("gpus", [8, 16])
def test_bounds_are_bounds(gpus: int) -> None:
    of = predictor(gpus)
    space = Space.of(of, {})
    for group in space.groups():
        costs = GroupCosts.of(of, group)
        pps, dps = space.cells(group)
        counts = 12 // (dps * group.micro_batch)
        for pp, dp, bound_s in zip(pps, dps, cell_bounds_s(costs, LAYERS, pps, counts), strict=True):
            for leaf in space.leaves(group, int(pp), int(dp)):
                assert of.on(of.cluster.part(leaf.devices)).price(leaf).step_time_s >= bound_s * (1 - 1e-12)


def test_recomputation_and_zero_are_priced_as_the_search_says() -> None:
    """What the search concludes without pricing: recomputation is never faster, ZeRO and schedule add up."""
    of = predictor(8)
    for part, leaf in everything(of):
        if leaf.recompute == "none":
            plain_s = part.price(leaf).step_time_s
            assert part.price(replace(leaf, recompute="full")).step_time_s >= plain_s
            if leaf.pp > 1 and leaf.zero in (1, 3):  # stage 2 goes with an interleaving
                changed = replace(leaf, schedule="1f1b", vpp=1)
                left = plain_s - part.price(changed).step_time_s
                right = part.price(replace(leaf, zero=0)).step_time_s - part.price(replace(changed, zero=0)).step_time_s
                assert left == pytest.approx(right, abs=1e-12)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 2, 4, 8, 16, 24, 32, 40]), st.sampled_from(LIMITS), st.sampled_from([8, 12, 30]))
def test_more_never_hurts(gpus: int, limit: int, batch: int) -> None:
    """More devices, more memory, a faster network: never slower."""
    of = predictor(gpus, limit, batch)
    try:
        found = choose(of).best.step_time_s
    except Infeasible:
        return
    more = predictor(gpus + 8 if gpus >= 8 else 8, limit, batch)
    assert choose(more).best.step_time_s <= found * (1 + 1e-12)
    assert choose(predictor(gpus, 2 * limit, batch)).best.step_time_s <= found * (1 + 1e-12)
    faster = tuple(replace(link, bytes_per_s=2 * link.bytes_per_s) for link in of.cluster.links)
    wider = of.on(replace(of.cluster, links=faster))
    wider.forget_prices()
    assert choose(wider).best.step_time_s <= found * (1 + 1e-12)


def test_pins_are_kept() -> None:
    of = predictor(16)
    for pin in ({"tp": 4}, {"pp": 2, "schedule": "gpipe"}, {"zero": 0, "cp": 1}, {"recompute": "full", "dp": 4},
                {"recompute": "full", "recompute_blocks": 1}, {"vpp": 3}, {"micro_batch": 3, "sp": False}):  # fmt: skip
        best = choose(of, **pin).best.layout
        assert {key: getattr(best, key) for key in pin} == pin
        free = choose(of).best.step_time_s
        assert choose(of, **pin).best.step_time_s >= free


def test_devices_may_stay_idle() -> None:
    """Eleven nodes have no good mesh for 12 sequences."""
    found = choose(predictor(88))
    assert found.devices < 88
    assert found.best.layout.devices == found.devices


@pytest.mark.parametrize(
    ("pin", "error", "message"),
    [
        ({"tensor": 2}, PinError, "'tensor' is no key of a layout"),
        ({"tp": 0}, LayoutError, "tp=0"),
        ({"tp": 3}, Infeasible, "no layout satisfies the pins"),
        ({"pp": 7}, Infeasible, "no layout satisfies the pins"),
        ({"schedule": "2f2b"}, LayoutError, "unknown schedule"),
        ({"ep": 2}, LayoutError, "ep=2, but the model has no grouped products over experts"),
        ({"pp": 4, "vpp": 3}, Infeasible, "pp=4 and vpp=3, but the model has 6 blocks"),
    ],
)
def test_impossible_pins(pin: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        choose(predictor(16), **pin)


def test_what_does_not_fit_says_what_it_needs() -> None:
    with pytest.raises(Infeasible, match="the leanest needs") as caught:
        choose(predictor(8, limit=1 << 28))
    assert caught.value.needed_bytes is not None
    assert caught.value.needed_bytes > 1 << 28
    assert choose(predictor(8, limit=caught.value.needed_bytes)).best.fits


def test_a_search_that_runs_out_of_time_says_how_far_it_came() -> None:
    of = predictor(16)
    search = LayoutSearch(of, Space.of(of, {}))
    with pytest.raises(Infeasible, match="time"):
        search.run(0.0)
