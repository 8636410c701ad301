"""Tiny models of several families, deep enough to be cut into stages; batch 8, float64, no dropout."""

from __future__ import annotations

from collections.abc import Callable

from tests import vision
from tests.families import _EXPERTS, _T5, _TEXT, _TOKENS, HEADS, Family, _labelled_images, _module, causal
from tests.families import _sequences as sequences
from tests.families import _transformer as transformer
from tests.models import HIDDEN, VOCAB, ModelAndInputs, tiny_llama


def _deep(layers: int) -> dict[str, object]:
    return {**_TEXT, "num_hidden_layers": layers, "num_key_value_heads": HEADS}


def _gpt2(layers: int) -> Family:
    sizes = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": layers, "n_head": HEADS, "n_positions": 64}
    return causal("GPT2LMHeadModel", **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def _gemma3(layers: int) -> Family:
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    return causal("Gemma3ForCausalLM", **_deep(layers), head_dim=8, sliding_window=8, layer_types=kinds, **_TOKENS)


def _mixtral(layers: int) -> Family:
    return causal("MixtralForCausalLM", **_deep(layers), num_local_experts=8, num_experts_per_tok=2, **_EXPERTS)


def _qwen3_moe(layers: int) -> Family:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return causal("Qwen3MoeForCausalLM", **_deep(layers), head_dim=8, **experts, **_EXPERTS)


def _t5(layers: int) -> Family:
    """So many blocks in encoder and decoder together; where that is odd, one more in the decoder."""
    return transformer(
        "T5ForConditionalGeneration",
        sequences,
        **{**_T5, "num_layers": layers // 2, "num_decoder_layers": layers - layers // 2},
    )


DEEP: dict[str, Callable[[int], Family]] = {
    "llama": lambda layers: lambda: tiny_llama(layers=layers),
    "gpt2": _gpt2,
    "gemma3": _gemma3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "t5": _t5,
    "resnet": lambda _: _module(vision.ResNet, lambda: _labelled_images(32)),
}

MICRO_BATCHES_OF = (4, 4, 2)  # by the number of axes of a stage's mesh: each rank has a sample or more


def dropping_gpt2() -> ModelAndInputs:
    """A GPT-2 of two layers with dropout everywhere."""
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    sizes = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 64}
    return causal("GPT2LMHeadModel", **sizes, **rates, attn_implementation="eager")()
