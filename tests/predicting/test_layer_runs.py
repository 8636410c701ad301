"""Models whose layers are alike in stretches (DeepSeek's first ones are dense): a few of each stretch are traced."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.choosing.plan import choose
from autopar.models import load_model
from autopar.predicting.predict import Predictor
from autopar.tracing.repeated import LayerRuns, layer_runs, repeated_layers
from tests.models import tiny_llama

LAYERS, DENSE, BATCH = 7, 2, 16
CLUSTER = autopar.ClusterSpec.preset("h100-sxm", gpus=8)
LAYOUTS = ("dp=8,zero=1", "pp=4,tp=2,micro_batch=2", "pp=4,dp=2,ep=2", "pp=2,tp=4,recompute=full", "pp=2,dp=4,cut=2/5")


@cache
def deepseek() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, num_experts_per_tok=2, use_cache=False, n_routed_experts=4, n_shared_experts=1,
        n_group=2, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=DENSE, kv_lora_rank=8, q_lora_rank=16,
        qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=4,
    )  # fmt: skip
    with torch.device("meta"):
        return DeepseekV3ForCausalLM._from_config(config, dtype=torch.bfloat16).train()


def predictor() -> Predictor:
    return Predictor(deepseek(), CLUSTER, seq=8, global_batch=BATCH)


def test_stretches_of_layers() -> None:
    found = layer_runs(deepseek())
    assert found == LayerRuns("model.layers", (DENSE, LAYERS - DENSE))
    assert found.kept() == (0, 1, 2, 4, 6)
    assert found.stands() == (0, 1, 2, 3, 3, 3, 4)
    assert LayerRuns("layers", (3, 58)).kept() == (0, 1, 2, 3, 32, 60)
    assert LayerRuns("layers", (7, 1, 7)).kept() == tuple(range(15))  # layer 7 would be the fourth, as 3 is
    assert repeated_layers(deepseek()) is None
    assert repeated_layers(tiny_llama(layers=5)[0]) == ("model.layers", 5)


def test_it_is_as_if_all_layers_were_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    few = predictor()
    monkeypatch.setattr(LayerRuns, "kept", lambda self: tuple(range(self.count)))
    every = predictor()
    assert len(few.sample.trace.params) < len(every.sample.trace.params)
    assert few.table.names == every.table.names == tuple(f"model.layers.{i}" for i in range(LAYERS))
    assert few.table.flops == pytest.approx(every.table.flops, rel=1e-12)
    assert few.table.firsts == (0, 1, 2, 3, 6) and len(every.table.kinds) == LAYERS
    mine_found, their_found = (choose(one, {"pp": 2, "ep": 2}, 60.0) for one in (few, every))
    assert mine_found.best.layout == their_found.best.layout and mine_found.gap == their_found.gap == 0
    for layout in LAYOUTS:
        mine, theirs = few.predict(layout), every.predict(layout)
        assert mine.step_time_s == pytest.approx(theirs.step_time_s, rel=1e-9), layout
        assert mine.peak_bytes == theirs.peak_bytes, layout
        assert mine.breakdown["blocks_per_stage"] == theirs.breakdown["blocks_per_stage"]


def test_deepseek_v3_with_pipelines_in_seconds() -> None:
    began = time.process_time()
    model: Any = load_model("deepseek-v3")
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=2048)
    layout = "pp=16,dp=128,ep=64,micro_batch=1,zero=1"
    found = autopar.predict(model, cluster, layout, seq=4096, global_batch=15360)
    assert isinstance(found, autopar.Prediction)
    assert sum(found.breakdown["blocks_per_stage"]) == 61 and min(found.breakdown["blocks_per_stage"]) >= 1
    held = sum(found.breakdown["memory_bytes"].values())
    assert found.peak_bytes == pytest.approx(held, rel=1e-6)
    assert time.process_time() - began < 60  # 61 layers one by one take minutes
