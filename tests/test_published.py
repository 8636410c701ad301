"""The rows of benchmarks/data: units, layouts and models, checked by other figures of the same source."""

from __future__ import annotations

from typing import Any

import pytest

from autopar.cluster import ClusterSpec
from autopar.errors import LayoutError
from autopar.layouts import Layout, check_layout, parse_layout
from autopar.predicting.run import Run
from benchmarks.published_models import build, cluster_of
from benchmarks.published_rows import (
    GIB,
    Case,
    Dims,
    layout_of,
    memory_cases,
    recompute_of,
    rows,
    sweep_cases,
    sweep_file,
    training_cases,
    zero_of,
)

CASES = {case.id: case for case in training_cases()[0]}
ROWS = {row["id"]: row for row in rows()}
SWEEP = {case.id: case for case in sweep_cases()[0]}


def megatron_flops(case: Case, passes: int) -> float:
    """FLOPs of a step by arXiv 2104.04473, equation 3: 3 passes are the model's own, 4 with recomputation."""
    d = case.dims
    blocks = 24 * d.seq * d.layers * d.hidden**2 * (1 + d.seq / (6 * d.hidden))
    head = 6 * d.seq * d.hidden * d.vocab
    return case.global_batch * (passes * blocks + head)


def decoder_flops(case: Case) -> float:
    """FLOPs of a step as 6 N + 12 L d s a token, N without the input embedding where that is not tied."""
    d = case.dims
    products = (
        d.hidden * (2 * d.hidden + 2 * d.hidden * d.kv_heads // d.heads) + (3 if d.gated else 2) * d.hidden * d.ffn
    )
    per_token = 6 * (d.layers * products + d.hidden * d.vocab) + 12 * d.layers * d.hidden * d.seq
    return case.global_batch * d.seq * per_token


def rate(case: Case, flops: float) -> float:
    """TFLOP/s of one device."""
    assert case.step_s is not None
    return flops / case.step_s / case.machine.gpus / 1e12


@pytest.mark.parametrize(
    "name", ["megatron21-t1-1.7B", "megatron21-t1-530B", "megatron21-t2-zero3-175B-384", "bloom-sweep-002"]
)
def test_printed_tflops_count_recomputation(name: str) -> None:
    assert rate(CASES[name], megatron_flops(CASES[name], 4)) == pytest.approx(
        ROWS[name]["measured"]["tflops_per_gpu"], rel=0.015
    )


def test_korthikanti_prints_seconds_and_model_flops() -> None:
    case = CASES["korthikanti22-175B-seqsel"]
    assert case.step_s == 13.75
    assert rate(case, megatron_flops(case, 3)) / 312 == pytest.approx(0.514, rel=0.01)


@pytest.mark.parametrize("name", ["mpt-h100_80gb-70b-s2048-n256", "mpt-a100_40gb-1b-s16384-n8"])
def test_mpt_prints_tokens_and_model_flops(name: str) -> None:
    assert rate(CASES[name], decoder_flops(CASES[name])) == pytest.approx(
        ROWS[name]["measured"]["tflops_per_gpu"], rel=0.02
    )


def test_torchtitan_prints_tokens_of_one_device() -> None:
    case = CASES["torchtitan-8B-fsdp128-compile"]
    assert case.step_s == pytest.approx(2 * 8192 / 6514)
    assert case.peak_bytes == 62.0 * GIB
    assert dict(case.run) == {"overlap": True, "selective": "products", "fusion": "all", "eager": False}
    device = cluster_of(case.machine).device
    assert device.memory_bytes_per_s == 2.4e12 and case.machine.power_share == 500 / 700
    usual = ClusterSpec.preset("h100-sxm", gpus=8).device
    assert device.matmul_efficiency_fraction == pytest.approx(usual.matmul_efficiency_fraction * (5 / 7) ** (1 / 3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mpt-a100_80gb-1b-s512-n8", {"overlap": True, "attention_factor": 2.0}),
        ("mpt-h100_80gb-70b-s2048-n256", {"overlap": True, "attention_factor": 1.65}),
        ("torchtitan-8B-fsdp8-eager", {"overlap": True, "selective": "products", "fusion": "none"}),
        ("korthikanti22-22B-seqsel", {"cut": "even"}),
        ("bloom-sweep-002", {"accumulates_apart": True, "reduces_whole": True}),
        (
            "internevo-7B-ckpt-16",
            {
                "overlap": True,
                "bucket_bytes": 1 << 30,
                "reduces_whole": True,
                "owners": True,
                "attention_factor": 2.0,
                "zero_ranks": 8,
            },
        ),
    ],
)
def test_how_a_framework_runs_a_row(name: str, options: dict[str, Any]) -> None:
    assert dict(CASES[name].run) == options
    Run(**options)


def test_the_sweep_is_of_nanotron() -> None:
    assert {c.run for c in SWEEP.values()} == {
        (("cut", "threshold"), ("reduces_whole", True), ("pipeline_pause_s", 0.27))
    }


def test_internevo_prints_tokens_of_one_device() -> None:
    case = CASES["internevo-7B-ckpt-8"]
    assert case.step_s == pytest.approx(64 * 2048 / (3314 * 8))
    assert rate(case, megatron_like(case)) == pytest.approx(193, rel=0.03)


def megatron_like(case: Case) -> float:
    """The same with a gated product, and every block computed again."""
    d = case.dims
    head = case.global_batch * d.seq * 6 * d.hidden * d.vocab
    return (decoder_flops(case) - head) * 4 / 3 + head


@pytest.mark.parametrize("name", ["Llama-like 1.34B", "Llama-like 8.86B", "Llama-like 80B"])
def test_sweep_prints_tokens_of_one_device_and_of_all(name: str) -> None:
    for case in (c for c in SWEEP.values() if c.source.startswith(name) and c.ran):
        run = sweep_file()["runs"][int(case.id.removeprefix("sweep-"))]
        assert case.step_s == pytest.approx(
            case.global_batch * 4096 / run["tokens_per_s_per_gpu"] / case.machine.gpus, rel=1e-2
        )
        assert case.peak_bytes is not None and case.peak_bytes < 80 * GIB


def test_networks_are_gbit_per_s_of_one_device() -> None:
    """Korthikanti's nodes have 8 x 200 Gbit/s; BLOOM's 4 x 100 Gbit/s for 8 devices."""
    for name, bytes_per_s in (("korthikanti22-175B-full", 25e9), ("bloom-176B-production", 6.25e9)):
        assert cluster_of(CASES[name].machine).inter_link.bytes_per_s == bytes_per_s


def test_memory_rows_are_gib_of_one_device() -> None:
    """18 bytes a parameter, on 8 devices; activations by arXiv 2205.05198, equation 1: sbh (10 + 24/t + 5as/ht)."""
    case = next(c for c in memory_cases() if c.id == "korthikanti22-mem-22B-no_recompute")
    d = case.dims
    assert case.expected["states"] == pytest.approx(18 * 22.07e9 / 8, rel=0.02)
    per_layer = d.seq * 4 * d.hidden * (10 + 24 / 8 + 5 * d.heads * d.seq / d.hidden / 8)
    assert case.expected["activations"] == pytest.approx(d.layers * per_layer, rel=0.02)
    assert not Layout(**case.layout).sp and case.layout["recompute"] == "none"


def test_what_is_compared_and_what_is_not() -> None:
    cases, skipped = training_cases()
    reasons = {s.id: s.reason for s in skipped}
    assert len(cases) + len(skipped) == sum(row["kind"] == "training" for row in rows())
    assert len(cases) > 150
    assert reasons["megatron-readme-175B-1024"] == "layout incomplete: micro_batch not given"
    assert reasons["ultrascale-tp-scaling-tp2"] == "layout incomplete: global_batch not given"
    assert reasons["bloom-sweep-090"] == "no time measured (out of memory)"
    assert reasons["torchtitan-8B-cp2"].startswith("products in float8 linear + bf16")
    assert reasons["alpa-gpt-2.6B-quicktest"] == "not on A100 or H100, but on V100-SXM2-16GB"
    assert [s.id for s in sweep_cases()[1]] and len(SWEEP) == 890


def test_every_layout_that_ran_is_possible() -> None:
    for case in (*CASES.values(), *memory_cases(), *(c for c in SWEEP.values() if c.ran)):
        check(case)


def check(case: Case) -> None:
    d = case.dims
    layout = parse_layout(case.layout, case.machine.gpus)
    sizes = {"blocks": d.layers, "heads": d.heads, "kv_heads": d.kv_heads, "seq": d.seq}
    check_layout(layout, global_batch=case.global_batch, **sizes)


def test_layouts_with_more_stages_than_blocks_failed() -> None:
    refused = []
    for case in SWEEP.values():
        try:
            check(case)
        except LayoutError as error:
            refused.append((case.ran, "stages" in str(error)))
    assert len(refused) > 30 and set(refused) == {(False, True)}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("megatron21-t1-530B", Layout(dp=9, tp=8, pp=35, vpp=3, sp=False, recompute="full")),
        ("korthikanti22-22B-seqsel", Layout(tp=8, micro_batch=4, recompute="selective")),
        (
            "bloom-sweep-002",
            Layout(dp=4, tp=8, pp=12, micro_batch=2, zero=1, sp=False, recompute="full", grad_dtype=None),
        ),
        ("bloom-176B-production", Layout(dp=8, tp=4, pp=12, micro_batch=2, zero=1, sp=False, recompute="full")),
        ("mpt-a100_80gb-70b-s2048-n64", Layout(dp=64, micro_batch=8, zero=3, recompute="full", grad_dtype=None)),
        ("internevo-7B-tp2-node-8", Layout(dp=4, tp=2, micro_batch=4, zero=1, sp=False, grad_dtype=None)),
        ("torchtitan-asynctp-8B-bf16-async", Layout(dp=8, tp=8, micro_batch=12, zero=3, recompute="selective")),
    ],
)
def test_layouts(name: str, layout: Layout) -> None:
    assert parse_layout(CASES[name].layout, CASES[name].machine.gpus) == layout


def test_words_of_rows() -> None:
    assert [zero_of(s) for s in (None, 3, "1 over 8 ranks (one node)")] == [0, 3, 1]
    assert recompute_of("full (uniform, every layer)") == "full" and recompute_of(None) == "none"
    with pytest.raises(ValueError, match="'half' is not known"):
        recompute_of("half")
    config: dict[str, Any] = ROWS["megatron21-t1-145B"]["config"]
    assert layout_of(config)["schedule"] == "interleaved"


@pytest.mark.parametrize(
    ("name", "kind", "attention", "dropout"),
    [
        ("korthikanti22-22B-full", "GPT2LMHeadModel", "eager", 0.1),
        ("bloom-sweep-002", "GPT2LMHeadModel", "eager", 0.1),
        ("bloom-176B-production", "BloomForCausalLM", "eager", 0.1),
        ("mpt-h100_80gb-1b-s65536-n8", "GPT2LMHeadModel", "sdpa", 0.0),
        ("internevo-7B-ckpt-8", "LlamaForCausalLM", "sdpa", 0.0),
    ],
)
def test_models(name: str, kind: str, attention: str, dropout: float) -> None:
    dims: Dims = CASES[name].dims
    model = build(dims)
    assert (type(model).__name__, dims.attention, dims.dropout) == (kind, attention, dropout)
    counted = sum(p.numel() for p in model.parameters()) / 1e9
    assert counted == pytest.approx(ROWS[name]["model"]["params_b"], rel=0.015)
