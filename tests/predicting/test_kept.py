"""What is kept for the backward pass under each way to fuse, and which lookup tables the tensor axis cuts."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import autopar
from autopar.predicting.predict import Predictor
from autopar.predicting.run import Run
from autopar.predicting.sizes import ACT_CUT, FIXED_CUT

HIDDEN, FFN, VOCAB, HEADS = 1024, 2816, 8192, 16


@cache
def predictor(fusion: str, seq: int = 512) -> Predictor:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=4, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=VOCAB, max_position_embeddings=seq, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).train()
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=8)
    return Predictor(model, cluster, seq=seq, global_batch=8, run=Run(fusion=fusion))


@pytest.mark.parametrize(("fusion", "widths"), [("none", 4), ("modules", 4), ("all", 3)])
def test_a_fused_gated_activation_keeps_what_it_is_made_of(fusion: str, widths: int) -> None:
    """Gate, up and their product; eager PyTorch keeps the activated gate, too. Attention: q, k, v and its result."""
    block = predictor(fusion).table.block
    assert block is not None
    token = 2 * (widths * FFN + 4 * HIDDEN)
    assert block.kept[ACT_CUT] / 512 == pytest.approx(token, rel=0.01)


@pytest.mark.parametrize("seq", [512, 4096])
def test_a_vocabulary_is_cut_whatever_the_sequence(seq: int) -> None:
    before = predictor("modules", seq).table.before
    assert before.parameters[FIXED_CUT] == VOCAB * HIDDEN
    assert np.count_nonzero(before.parameters) == 1
