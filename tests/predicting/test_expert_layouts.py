"""Layouts with expert ranks: what they cost follows from the sizes of the model, and from who exchanges what."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import autopar
from autopar.choosing.plan import choose
from autopar.cost.axes import MeshAxis
from autopar.cost.collectives import collective_time_s
from autopar.errors import LayoutError
from autopar.layouts import Layout, parse_layout
from autopar.predicting.predict import Predictor
from autopar.predicting.run import Run
from autopar.simulating.simulate import simulate_layout

HIDDEN, INNER, EXPERTS, TOP, LAYERS, HEADS, SEQ, VOCAB = 512, 1024, 8, 2, 4, 8, 256, 2048
MATRICES = LAYERS * EXPERTS * 3 * HIDDEN * INNER
CLUSTER = autopar.ClusterSpec.preset("h100-sxm", gpus=16)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=VOCAB, num_local_experts=EXPERTS, num_experts_per_tok=TOP,
        use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return MixtralForCausalLM._from_config(config, dtype=torch.bfloat16).train()


@cache
def predictor() -> Predictor:
    return Predictor(mixtral(), CLUSTER, seq=SEQ, global_batch=64)


def priced(text: str, of: Predictor | None = None) -> autopar.Prediction:
    return (of or predictor()).predict(text)


@pytest.mark.parametrize("ep", [1, 2, 4, 8])
def test_a_rank_has_its_experts_and_all_else(ep: int) -> None:
    of, layout = predictor(), parse_layout(f"ep={ep}", 16)
    job, (stage,) = of.job(layout), of.stages(layout)
    dense = sum(p.numel() for p in mixtral().parameters()) - MATRICES
    assert job.numbers(stage) == dense + MATRICES / ep
    parameters = of.memory(layout).parameters
    assert parameters == 2 * (dense + MATRICES / ep)  # bfloat16


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_zero_shares_is_shared_by_those_who_have_it(zero: int) -> None:
    """Everything that ZeRO cuts comes to the same with expert ranks: experts have fewer replicas, and fewer experts."""
    alone, spread = (predictor().memory(parse_layout(f"zero={zero},ep={ep}", 16)) for ep in (1, 8))
    for name, since in (("optimizer", 1), ("gradients", 2), ("parameters", 3)):
        one, other = getattr(alone, name), getattr(spread, name)
        if zero >= since and name != "parameters":  # of these, two blocks are whole
            assert other == pytest.approx(one, rel=1e-12)
        elif zero < since:
            assert other < 0.5 * one


def test_gradients_of_experts_go_around_fewer_ranks() -> None:
    of = predictor()
    made = priced("ep=4").breakdown["gradients_s"]
    dense = 4 * (sum(p.numel() for p in mixtral().parameters()) - MATRICES)
    bucket = of.run.bucket_bytes
    expected = 0.0
    for nbytes, axis in ((dense, MeshAxis(16, 1)), (4 * MATRICES / 4, MeshAxis(4, 4))):
        count = max(1, -(-nbytes // bucket))
        expected += count * collective_time_s("all_reduce", nbytes / count, axis, CLUSTER)
    assert made == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("ep", [2, 8])
def test_rows_are_exchanged_there_and_back_both_ways(ep: int) -> None:
    """Forward rows of tokens out and of results back; backward their gradients; and counts."""
    rows, axis = 2 * SEQ * TOP * HIDDEN, MeshAxis(ep, 1)
    each = 4 * collective_time_s("all_to_all", rows, axis, CLUSTER)
    each += collective_time_s("all_to_all", 8 * EXPERTS, axis, CLUSTER)
    micro_batches = 64 / 16
    made = priced(f"ep={ep}").breakdown["expert_messages_s"]
    assert made == pytest.approx(LAYERS * micro_batches * each, rel=1e-9)


def test_one_node_exchanges_faster_than_two() -> None:
    inside, outside = (priced(f"tp=2,ep={ep}").breakdown["expert_messages_s"] for ep in (4, 8))
    assert outside > 2 * inside, (outside, inside)


@pytest.mark.parametrize(
    ("load", "ep", "share"),
    [
        ("1.25", 4, 1.25),
        ("2:2:1:1:1:1:1:1", 8, 1.6),
        ("2:2:1:1:1:1:1:1", 4, 1.6),
        ("2:2:1:1:1:1:1:1", 2, 1.2),
        ("5:3:5:3:5:3:5:3", 4, 1.0),
        ("2:2:1:1:1:1:1:1", 1, 1.0),
    ],
)
def test_the_busiest_rank_decides(load: str, ep: int, share: float) -> None:
    even, uneven = priced(f"ep={ep}"), priced(f"ep={ep},expert_load={load}")
    assert uneven.layout.busiest_share == pytest.approx(share)
    assert uneven.breakdown.get("busiest_share", 1.0) == pytest.approx(share)
    if share == 1.0:
        assert uneven.step_time_s == even.step_time_s
        return
    block = predictor().table.block
    assert block is not None
    for one in (block.forward, block.backward):
        least, more = (predictor().pricer.work(one, predictor().shape(p.layout)).kernels_s for p in (even, uneven))
        assert least < more < 1.1 * share * least  # launches hide less of longer kernels
    assert uneven.breakdown["expert_messages_s"] > even.breakdown["expert_messages_s"]
    assert uneven.peak_bytes > even.peak_bytes
    factor = priced(f"ep={ep},expert_load={share}")
    assert uneven.step_time_s == pytest.approx(factor.step_time_s)


@pytest.mark.parametrize("text", ["ep=8", "ep=4,tp=2,zero=1", "ep=2,pp=2,zero=1,micro_batch=2", "ep=4,zero=3,pp=2"])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_simulator_agrees(text: str, overlap: bool) -> None:
    of = predictor().on(CLUSTER)
    of.run = replace(Run(), overlap=overlap)
    of.forget_prices()
    made = of.predict(text)
    simulated = simulate_layout(of, made.layout)
    tolerance = 1e-9 if made.layout.pp == 1 and made.layout.zero < 3 and not overlap else 0.1
    assert simulated.step_time_s == pytest.approx(made.step_time_s, rel=tolerance)
    exchanged = sum(t.end_s - t.start_s for t in simulated.tasks if t.stage == 0 and t.lane == "expert axis")
    assert exchanged > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ep=3", "ep=3 does not divide dp"),
        ("ep=16", "8 experts cannot be spread evenly over ep=16 ranks; choose a divisor of 8"),
        ("ep=4,expert_load=0.9", "expert_load=0.9 must be a factor of at least 1"),
        ("ep=4,expert_load=much", "expert_load=much must be a factor"),
        ("ep=4,expert_load=1:1:1", "the rows of 3 experts, not a multiple of ep=4"),
        ("ep=2,expert_load=1:1:1:1", "the rows of 4 experts, but a layer has 8"),
        ("ep=4,expert_load=0:0:0:0:0:0:0:0", "not all 0"),
    ],
)
def test_impossible_layouts(text: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        priced(text)


def test_a_layout_with_a_histogram_is_read_as_it_is_written() -> None:
    layout = Layout(dp=8, ep=8, expert_load=(1, 2, 3, 4, 5, 6, 7, 8))
    assert parse_layout(str(layout), 8) == parse_layout(layout.to_dict(), 8) == layout


def test_the_search_spreads_experts_where_memory_asks_for_it() -> None:
    of = predictor()
    limit = of.predict("ep=8,zero=0").peak_bytes + (1 << 20)
    tight = of.on(CLUSTER)
    tight.limit_bytes = limit
    found = choose(tight, {"pp": 1, "tp": 1, "cp": 1, "zero": 0, "micro_batch": 1, "recompute": "none"}, 20.0)
    assert found.best.layout.ep == 8 and found.gap == 0
    free = choose(of, {"pp": 2}, 20.0)
    without = choose(of, {"pp": 2, "ep": 1}, 20.0)
    assert free.best.step_time_s <= without.best.step_time_s * (1 + 1e-9)
