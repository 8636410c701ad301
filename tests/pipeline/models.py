"""Tiny models of several families, deep enough to be cut into stages; batch 8, float64, no dropout."""

from __future__ import annotations

from collections.abc import Callable

from tests import vision
from tests.families import _EXPERTS, _T5, _TEXT, _TOKENS, HEADS, Family, _causal, _labelled_images, _module
from tests.families import _sequences as sequences
from tests.families import _transformer as transformer
from tests.models import HIDDEN, VOCAB, tiny_llama


def _deep(layers: int) -> dict[str, object]:
    return {**_TEXT, "num_hidden_layers": layers, "num_key_value_heads": HEADS}


def _gpt2(layers: int) -> Family:
    sizes = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": layers, "n_head": HEADS, "n_positions": 64}
    return _causal("GPT2LMHeadModel", **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def _gemma3(layers: int) -> Family:
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    return _causal("Gemma3ForCausalLM", **_deep(layers), head_dim=8, sliding_window=8, layer_types=kinds, **_TOKENS)


def _mixtral(layers: int) -> Family:
    return _causal("MixtralForCausalLM", **_deep(layers), num_local_experts=8, num_experts_per_tok=2, **_EXPERTS)


def _qwen3_moe(layers: int) -> Family:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _causal("Qwen3MoeForCausalLM", **_deep(layers), head_dim=8, **experts, **_EXPERTS)


def _t5(layers: int) -> Family:
    """So many blocks in encoder and decoder together."""
    return transformer("T5ForConditionalGeneration", sequences, **{**_T5, "num_layers": layers // 2})


DEEP: dict[str, Callable[[int], Family]] = {
    "llama": lambda layers: lambda: tiny_llama(layers=layers),
    "gpt2": _gpt2,
    "gemma3": _gemma3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "t5": _t5,
    "resnet": lambda _: _module(vision.ResNet, lambda: _labelled_images(32)),
}
