"""Llama-3 8B on one sequence of 1,048,576 tokens and 64 GPUs: it takes attention cut along the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar.errors import Infeasible
from autopar.models import load_model
from autopar.staged import StagedPlan

TOKENS, GPUS = 1_048_576, 64


def million(**pin: Any) -> autopar.Plan:
    """The plan by name of model and cluster."""
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=GPUS)
    return autopar.plan(load_model("llama3-8b"), cluster, seq=TOKENS, global_batch=1, pin=pin)


def small(ranks: int) -> tuple[LlamaForCausalLM, dict[str, torch.Tensor]]:
    """The same architecture, two layers of 32 units, so that ranks do not divide the heads; four tokens a rank."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=4 * ranks, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, 64, (1, 4 * ranks), generator=torch.Generator().manual_seed(0))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.slow
def test_it_fits_with_the_sequence_cut_and_not_without() -> None:
    plan = million()
    assert plan.predicted["fits"]
    assert plan.layout()["cp"] > 1
    with pytest.raises(Infeasible, match="no layout fits") as refused:
        million(cp=1)
    assert "cp=2 instead of 1" in str(refused.value)  # the smallest fix


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "pin"),
    [
        (GPUS, {"dp": 1, "tp": 1, "cp": GPUS, "zero": 3, "recompute": "full"}),  # what is found for the million
        (8, {"pp": 2, "cp": 4, "recompute": "full"}),  # rings in the stages of a pipeline
    ],
    ids=str,
)
def test_the_layout_is_proven_at_reduced_size(ranks: int, pin: dict[str, Any]) -> None:
    model, batch = small(ranks)
    plan = autopar.plan(model, autopar.ClusterSpec.preset("h100-sxm", gpus=ranks), example_inputs=((), batch), pin=pin)
    assert isinstance(plan, StagedPlan)
    report = autopar.verify(model, plan, example_inputs=((), batch))
    assert report.ranks == ranks
    assert max(report.loss_error, report.worst_gradient_error) <= 1e-5  # float32
