"""Predictions of named layouts: what the model's tensors and products must come to."""

from __future__ import annotations

import copy
import dataclasses
import time
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.cost.collectives import collective_time_s
from autopar.cost.compute import OpClass
from autopar.layouts import Layout
from autopar.predicting.predict import Predictor
from autopar.predicting.reductions import returned
from autopar.predicting.run import Run
from autopar.predicting.sizes import Shape
from autopar.predicting.stages import split, stage_work
from autopar.predicting.step import send_parts_s
from autopar.predicting.table import ModelTable
from autopar.predicting.work import Pricer

HEADS, HIDDEN, SEQ, LAYERS, VOCAB = 16, 1024, 512, 8, 4096
CLUSTER = autopar.ClusterSpec.preset("a100-80g", gpus=8)


def gpt(**changes: Any) -> nn.Module:
    """Megatron's GPT: separate projections, GELU, dropout, scores written out."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, ffn_dim=4 * HIDDEN, vocab_size=VOCAB,
        max_position_embeddings=SEQ, word_embed_proj_dim=HIDDEN, activation_function="gelu", use_cache=False, **changes,
    )  # fmt: skip
    config.dropout = config.attention_dropout = 0.1
    with torch.device("meta"):
        return OPTForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float16).train()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=2816, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=VOCAB, max_position_embeddings=SEQ, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).train()


@cache
def predictor(name: str, batch: int = 32) -> Predictor:
    return Predictor({"gpt": gpt, "llama": llama}[name](), CLUSTER, seq=SEQ, global_batch=batch)


def block(name: str) -> Any:
    table: ModelTable = predictor(name).table
    assert table.block is not None
    return table.block


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (8, False), (8, True)])
def test_activations_of_a_gpt_layer(tensor: int, sequence: bool) -> None:
    """Korthikanti et al. 2022, table 2: bytes a layer keeps, s b h (...), from nothing but the trace."""
    micro_batch = 4
    tokens = SEQ * micro_batch * HIDDEN
    scores = 5 * HEADS * SEQ / HIDDEN
    expected = tokens * (34 + scores) / tensor if sequence else tokens * (10 + 24 / tensor + scores / tensor)
    kept = float(block("gpt").kept @ Shape(micro_batch, tensor, 1, sequence).weights)
    assert kept == pytest.approx(expected, rel=1e-3)


def test_selective_and_full_recomputation_keep_what_the_paper_says() -> None:
    weights = Shape(4, 8, 1, True).weights
    tokens = SEQ * 4 * HIDDEN
    assert float(block("gpt").kept_selective @ weights) == pytest.approx(34 * tokens / 8, rel=1e-3)
    assert float(block("gpt").boundary @ Shape(4, 8).weights) == pytest.approx(2 * tokens)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_tensor_parallelism_is_megatrons(name: str) -> None:
    """Two sums a layer and pass, all matrices cut, and the products of a rank are its share."""
    for one in (block(name).forward, block(name).backward):
        assert [m.kind for m in one.messages].count("sum") == 2
    whole, cut = block(name).parameters[:2]
    assert whole < cut / 100
    flops = sum(k.flops for k in block(name).forward.kernels)
    assert float(flops @ Shape(2, 8).weights) == pytest.approx(float(flops @ Shape(2).weights) / 8, rel=0.02)


def test_flops_are_the_models() -> None:
    """2 FLOPs a parameter of a matrix and token, thrice, and the attention (causal or not, as traced)."""
    table = predictor("gpt").table
    matrices = LAYERS * 12 * HIDDEN**2 + VOCAB * HIDDEN
    attention = LAYERS * 4 * SEQ * HIDDEN
    assert table.flops == pytest.approx(3 * SEQ * (2 * matrices + attention), rel=1e-3)


def test_parameters_and_state_in_memory() -> None:
    """Half precision: 2 bytes a parameter, 4 of its gradients' sum, 12 of state; less by ZeRO stage.

    78 % of a micro-batch's own gradients are there at the peak, and of what ZeRO gathers: 1.56 bytes each. Without
    ZeRO the copy that data-parallel ranks exchange is always there: 2 bytes.
    """
    count = sum(p.numel() for p in llama().parameters())
    found = {zero: predictor("llama").predict({"zero": zero}).breakdown["memory_bytes"] for zero in (0, 1, 2)}
    assert found[0]["parameters"] == 2 * count
    assert found[0]["gradients"] == pytest.approx((4 + 1.56 + 2) * count)
    assert found[0]["optimizer"] == 12 * count
    assert found[1]["optimizer"] == pytest.approx(12 * count / 8, abs=1)
    assert found[1]["gradients"] == pytest.approx((4 + 2 * 1.56) * count)
    assert found[2]["gradients"] == pytest.approx(found[1]["gradients"] / 8)


def test_more_devices_of_a_degree_do_what_they_are_for() -> None:
    base = predictor("llama").predict("dp=8")
    assert predictor("llama").predict("tp=8").peak_bytes < base.peak_bytes
    assert predictor("llama").predict("pp=8").peak_bytes < base.peak_bytes
    assert predictor("llama").predict("dp=8,recompute=full").peak_bytes < base.peak_bytes
    assert predictor("llama").predict("dp=8,recompute=full").step_time_s > base.step_time_s
    bubbles = [predictor("llama").predict(x).breakdown["bubble_s"] for x in ("pp=4", "pp=4,vpp=2")]
    assert bubbles[0] == pytest.approx(2 * bubbles[1], rel=0.35)


def test_each_block_that_runs_again_takes_time_and_gives_memory() -> None:
    made = predictor("llama")
    texts = ["recompute=none", *(f"recompute=full,recompute_blocks={k}" for k in range(1, 7)), "recompute=full"]
    found = [made.predict(f"tp=2,pp=2,{text}") for text in texts]
    held = [p.breakdown["memory_bytes"]["activations"] for p in found]
    again = [p.breakdown["recompute_s"] for p in found]
    on_a_stage = max(found[0].breakdown["blocks_per_stage"])
    assert again[0] == 0
    assert all(a < b for a, b in pairwise(again[: on_a_stage + 1]))
    assert all(a > b for a, b in pairwise(held[: on_a_stage + 1]))
    assert again[on_a_stage] == again[-1]  # all of them
    assert held[on_a_stage] == held[-1]


def test_figures_agree_with_each_other() -> None:
    found = predictor("llama").predict("dp=2,tp=2,pp=2")
    parts = sum(v for k, v in found.breakdown.items() if k.endswith("_s"))
    assert found.step_time_s == pytest.approx(parts, rel=1e-9)
    assert found.tokens_per_s_per_gpu == pytest.approx(32 * SEQ / found.step_time_s / 8)
    assert found.mfu == pytest.approx(found.hfu) and 0 < found.mfu < 1
    assert found.peak_bytes == pytest.approx(sum(found.breakdown["memory_bytes"].values()), abs=8)


def test_utilisation_is_of_the_rate_that_the_products_run_at() -> None:
    """Under autocast that is bfloat16's, whatever the parameters are kept in."""
    mixed = Predictor(llama().float(), CLUSTER, seq=SEQ, global_batch=32, precision="bf16")
    found = mixed.predict("dp=8")
    assert mixed.table.dtype == "float32"
    flops = mixed.table.flops * 32 / 8 / found.step_time_s
    assert found.mfu == pytest.approx(flops / CLUSTER.device.peak_flops("bfloat16"))


def test_a_list_of_layouts_is_priced_quickly() -> None:
    """200 layouts a second, once the model is traced."""
    one = predictor("llama", 128)
    layouts = [
        {"tp": t, "pp": p, "micro_batch": m, "zero": z}
        for t in (1, 2, 4) for p in (1, 2) for m in (1, 2, 4) for z in (0, 1, 2)
    ]  # fmt: skip
    one.predict(layouts[0])
    began = time.process_time()
    assert all(one.predict(layout).step_time_s > 0 for layout in layouts)
    assert len(layouts) / (time.process_time() - began) > 200


@pytest.mark.parametrize(
    ("layout", "message"),
    [("tp=3", "8"), ("pp=16,tp=1", "16"), ("dp=8,micro_batch=3", "micro_batch"), ("tp=8,nonsense=1", "nonsense")],
)
def test_impossible_layouts_are_refused(layout: str, message: str) -> None:
    with pytest.raises(autopar.LayoutError, match=message):
        predictor("llama").predict(layout)


def test_models_without_sequences_or_a_list_of_layers() -> None:
    """A classifier of images: convolutions, no tokens; its blocks are all different."""
    from tests.families import FAMILIES

    model, call = FAMILIES["resnet"]()
    plain, cut = autopar.predict(model, CLUSTER, ["dp=8", "dp=4,tp=2"], example_inputs=call, global_batch=64)
    assert plain.tokens_per_s_per_gpu == pytest.approx(64 / plain.step_time_s / 8)
    assert cut.step_time_s > 0
    two = autopar.predict(model, CLUSTER, "pp=2", example_inputs=call, global_batch=64)
    assert sum(two.breakdown["blocks_per_stage"]) == 7
    with pytest.raises(autopar.LayoutError, match=r"8 stages, but the model has 7 blocks \(stem.0 to layer2.0\)"):
        autopar.predict(model, CLUSTER, "pp=8", example_inputs=call, global_batch=64)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_keys_and_values_go_around_the_context_axis(name: str) -> None:
    """Two tensors of [tokens, width] a layer, on the tensor axis a share; without a context axis nothing is sent."""
    weights = Shape(2, 4).weights
    width = predictor(name).table.itemsize * SEQ * HIDDEN
    for one in (block(name).forward, block(name).backward):
        assert float(one.shown @ weights) == pytest.approx(2 * 2 * width / 4)
    pricer = predictor(name).pricer
    alone, ring = (pricer.work(block(name).forward, Shape(8, 1, c)) for c in (1, 4))
    assert alone.messages_s == 0
    assert ring.kernels_s < alone.kernels_s


def test_a_slow_network_shows_in_the_ring() -> None:
    slow = autopar.ClusterSpec.preset("a100-80g", gpus=16, inter_node_gbit_per_s=1.0)
    model = llama()
    near, far = autopar.predict(model, slow, ["dp=2,cp=8", "dp=1,cp=16"], seq=SEQ, global_batch=32)
    assert near.breakdown["tensor_messages_s"] < far.breakdown["tensor_messages_s"]
    assert far.breakdown["tensor_messages_s"] > 0.5 * far.step_time_s


def test_cuts_into_stages() -> None:
    """By count; or as nanotron does: the block that exceeds a stage's share of the parameters still belongs to it."""
    table, layout, shape = predictor("llama").table, Layout(pp=4), Shape(1)
    counts = {
        cut: [s.blocks for s in split(table, layout, Pricer(CLUSTER, Run(cut=cut)), shape)]
        for cut in ("even", "threshold", "balanced", "ends")
    }
    assert counts["even"] == [2, 2, 2, 2]
    assert sum(counts["threshold"]) == sum(counts["balanced"]) == sum(counts["ends"]) == LAYERS
    assert counts["ends"] == [2, 3, 2, 1]  # with one more each for what comes before and after
    per_block, head = float(block("llama").parameters.sum()), VOCAB * HIDDEN
    share = (LAYERS * per_block + head) / 4
    assert (counts["threshold"][0] - 1) * per_block <= share < counts["threshold"][0] * per_block
    assert counts["threshold"][-1] < 2  # it has the head


def test_recomputation_of_every_other_product() -> None:
    """Attention and products 1, 3, 5 and 7 of 7 are kept; 2, 4 and 6 and all that is elementwise run again."""
    again, whole = block("llama").again_products, block("llama").forward
    assert sum(k.dims is not None for k in whole.kernels) == 7
    assert sum(k.dims is not None for k in again.kernels) == 3
    assert not any(k.kind is OpClass.ATTENTION for k in again.kernels)
    weights = Shape(2).weights
    assert float(block("llama").kept_products @ weights) < 0.6 * float(block("llama").kept @ weights)


def test_owners_of_whole_parameters_broadcast_them_one_by_one() -> None:
    """No more messages than ranks that share the state, nor than parameters."""
    made = copy.copy(predictor("llama"))
    made.run = Run(owners=True)
    layout = Layout(dp=8, zero=1)
    job, stage = made.job(layout), made.stages(layout)[0]
    assert job.tensors(stage) == len(list(llama().parameters()))
    ((count, seconds),) = returned(job, stage, stage_work(job.table, stage, layout, job.pricer, job.shape))
    assert count == 8
    assert seconds == collective_time_s("broadcast", 2 * job.numbers(stage) / 8, job.zero_axis, job.cluster)


def test_a_tensor_group_over_nodes_holds_up_the_host_of_a_pipeline() -> None:
    """By what each collective takes on top, wherever the pipeline's own stalls are."""
    forward, cluster = block("llama").forward, autopar.ClusterSpec.preset("a100-80g", gpus=16)
    shape = Shape(1, 16, far_pipeline=True)
    near, far = (Pricer(cluster, Run(far_tensor_s=s)).work(forward, shape) for s in (0.0, 1e-3))
    assert far.host_s - near.host_s == pytest.approx(len(forward.messages) * 16e-3)


def test_interleaved_stages_compute_while_they_send() -> None:
    """A send that takes longer than a chunk's pass shows by the difference."""
    made = copy.copy(predictor("llama"))

    def sends_s(layout: str, **options: Any) -> float:
        made.run = Run(**options)
        made.forget_prices()
        return float(made.predict(layout).breakdown["send_s"])

    assert sends_s("dp=2,pp=4,vpp=2") == 0
    waits = sends_s("dp=2,pp=4,vpp=2", overlaps_sends=False)
    assert waits == pytest.approx(2 * sends_s("dp=2,pp=4")) and waits > 0
    slow = predictor("llama").elsewhere(slow_links(CLUSTER))
    layout = Layout(dp=2, pp=4, vpp=2)
    job, stage = slow.job(layout), slow.stages(layout)[0]
    work = stage_work(job.table, stage, layout, job.pricer, job.shape)
    shown = 2 * sum(send_parts_s(job)) - (work.forward.seconds + work.whole_backward.seconds) / 2
    found = slow.price(layout).breakdown["send_s"]
    assert 0 < found <= job.micro_batches * 2 * shown


def slow_links(cluster: autopar.ClusterSpec) -> autopar.ClusterSpec:
    slow = dataclasses.replace(cluster.links[0], bytes_per_s=2e8)
    return dataclasses.replace(cluster, links=(slow, *cluster.links[1:]))


def test_habits_of_frameworks_change_what_they_should() -> None:
    usual = predictor("llama").price(Layout(dp=8, zero=1))

    def with_run(**options: Any) -> Any:
        made = copy.copy(predictor("llama"))
        made.run = Run(**options)
        made.forget_prices()
        return made.price(Layout(dp=8, zero=1))

    assert with_run(reduces_whole=True).breakdown["gradients_s"] > usual.breakdown["gradients_s"]
    assert with_run(overlap=True).breakdown["gradients_s"] < usual.breakdown["gradients_s"]
    assert with_run(zero_ranks=2).breakdown["gradients_s"] < usual.breakdown["gradients_s"]
    assert with_run(zero_ranks=2).breakdown["memory_bytes"]["optimizer"] == pytest.approx(
        4 * usual.breakdown["memory_bytes"]["optimizer"], abs=8
    )
    ahead = with_run(gathers_ahead=True).breakdown["gradients_s"]
    assert usual.breakdown["gradients_s"] / 2 < ahead < usual.breakdown["gradients_s"]
    assert with_run(owners=True).breakdown["gradients_s"] > usual.breakdown["gradients_s"]
    slow, fast = (Pricer(CLUSTER, Run(attention_factor=f)).work(block("llama").forward, Shape(4)) for f in (2.0, 1.0))
    assert slow.kernels_s > fast.kernels_s
