"""The zoo: well-known models by name, as transformers classes and the arguments of their configs.

Every model is built with random weights and traced like any other; nothing else in autopar knows these names. Figures
are those of the papers, or of the config.json that came with the weights where the papers leave something out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo: a transformers class, the arguments of its config, and where these come from.

    The dtype is that of the published weights, or of the training run, where weights were not published.
    """

    model_class: str
    config_class: str
    config: dict[str, Any]
    source: str


def _decoder(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, positions: int, theta: float,
             source: str, dtype: str = "bfloat16", *, kind: str = "Llama", **more: Any) -> ZooModel:  # fmt: skip
    """A decoder in the form of Llama: RMSNorm, rotary positions, gated products, grouped key-value heads."""
    config = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "rope_theta": theta,
        "tie_word_embeddings": False,
        "use_cache": False,
        "dtype": dtype,
        **more,
    }
    return ZooModel(f"{kind}ForCausalLM", f"{kind}Config", config, source)


def _gpt(heads: int, hidden: int, layers: int, source: str) -> ZooModel:
    """A GPT as Megatron trains it: learned positions, dropout 0.1, the vocabulary padded to 51,200, exact gelu."""
    config = {
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 2048,
        "vocab_size": 51200,
        "activation_function": "gelu",
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "use_cache": False,
        "dtype": "float16",
    }
    return ZooModel("GPT2LMHeadModel", "GPT2Config", config, source)


_LLAMA2 = "Touvron et al. 2023, Llama 2; its config.json"
_LLAMA3 = "Grattafiori et al. 2024, The Llama 3 Herd of Models, table 3"
_MEGATRON = "Narayanan et al. 2021 (arXiv 2104.04473), table 1"
_KORTHIKANTI = "Korthikanti et al. 2022 (arXiv 2205.05198), table 3"
_QWEN3 = "Yang et al. 2025, Qwen3 technical report, tables 1 and 2; its config.json"
_NANOTRON = "Tazi et al. 2025, The Ultra-Scale Playbook, benchmark sweep; nanotron scripts/scaling_benchmarks.py"


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> ZooModel:
    more: dict[str, Any] = {"head_dim": 128, "tie_word_embeddings": tied}
    return _decoder(hidden, inner, layers, heads, 8, 151936, 40960, 1e6, _QWEN3, kind="Qwen3", **more)


def _qwen3_moe(hidden: int, expert: int, inner: int, layers: int, heads: int) -> ZooModel:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert}
    more: dict[str, Any] = {"head_dim": 128, **experts}
    return _decoder(hidden, inner, layers, heads, 4, 151936, 40960, 1e6, _QWEN3, kind="Qwen3Moe", **more)


def _mixtral(hidden: int, inner: int, layers: int, heads: int, positions: int, source: str) -> ZooModel:
    more: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
    return _decoder(hidden, inner, layers, heads, 8, 32000, positions, 1e6, source, kind="Mixtral", **more)


def _nanotron(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> ZooModel:
    return _decoder(
        hidden, inner, layers, heads, heads, 131072, 4096, 1e4, _NANOTRON, tie_word_embeddings=tied
    )  # fmt: skip


_LLAMAS = {
    "tiny-llama": _decoder(128, 384, 4, 8, 4, 256, 1024, 1e4, "made up: trains on a CPU in a minute", "float32"),
    "llama2-7b": _decoder(4096, 11008, 32, 32, 32, 32000, 4096, 1e4, _LLAMA2, "float16"),
    "llama2-13b": _decoder(5120, 13824, 40, 40, 40, 32000, 4096, 1e4, _LLAMA2, "float16"),
    "llama2-70b": _decoder(8192, 28672, 80, 64, 8, 32000, 4096, 1e4, _LLAMA2, "float16"),
    "llama3-8b": _decoder(4096, 14336, 32, 32, 8, 128256, 8192, 5e5, _LLAMA3),
    "llama3-70b": _decoder(8192, 28672, 80, 64, 8, 128256, 8192, 5e5, _LLAMA3),
    "llama3-405b": _decoder(16384, 53248, 126, 128, 8, 128256, 131072, 5e5, _LLAMA3),
    "nanotron-1.3b": _nanotron(2048, 8192, 16, 32, True),
    "nanotron-3.6b": _nanotron(3072, 8192, 28, 32, True),
    "nanotron-8.9b": _nanotron(4096, 14336, 32, 32, False),
    "nanotron-80b": _nanotron(8192, 28672, 80, 64, False),
}

_MISTRALS = {
    "mistral-7b": _decoder(
        4096, 14336, 32, 32, 8, 32000, 32768, 1e4, "Jiang et al. 2023, Mistral 7B, table 1",
        kind="Mistral", sliding_window=4096,
    ),
    "mixtral-8x7b": _mixtral(4096, 14336, 32, 32, 32768, "Jiang et al. 2024, Mixtral of Experts, table 1"),
    "mixtral-8x22b": _mixtral(6144, 16384, 56, 48, 65536, "config.json of mistralai/Mixtral-8x22B-v0.1 (2024)"),
}  # fmt: skip

_QWENS = {
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, False),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, False),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, False),
    "qwen3-30b-a3b": _qwen3_moe(2048, 768, 6144, 48, 32),
    "qwen3-235b-a22b": _qwen3_moe(4096, 1536, 12288, 94, 64),
}

_GPTS = {
    "gpt3-175b": _gpt(96, 12288, 96, "Brown et al. 2020, table 2.1, dense attention in every layer; padded vocabulary"),
    "megatron-1.7b": _gpt(24, 2304, 24, _MEGATRON),
    "megatron-3.6b": _gpt(32, 3072, 30, _MEGATRON),
    "megatron-7.5b": _gpt(32, 4096, 36, _MEGATRON),
    "megatron-18b": _gpt(48, 6144, 40, _MEGATRON),
    "megatron-22b": _gpt(64, 6144, 48, _KORTHIKANTI),
    "megatron-39b": _gpt(64, 8192, 48, _MEGATRON),
    "megatron-76b": _gpt(80, 10240, 60, _MEGATRON),
    "megatron-145b": _gpt(96, 12288, 80, _MEGATRON),
    "megatron-310b": _gpt(128, 16384, 96, _MEGATRON),
    "megatron-530b": _gpt(128, 20480, 105, f"{_MEGATRON}; MT-NLG in {_KORTHIKANTI}"),
    "megatron-1t": _gpt(160, 25600, 128, f"{_MEGATRON}; {_KORTHIKANTI}"),
}

_OTHERS = {
    "deepseek-v3": ZooModel(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 3,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 129280,
            "max_position_embeddings": 4096,
            "use_cache": False,
            "dtype": "bfloat16",
        },
        "DeepSeek-AI 2024, DeepSeek-V3, section 4.2, in bfloat16 and without multi-token prediction",
    ),
    "bloom-176b": ZooModel(
        "BloomForCausalLM",
        "BloomConfig",
        {
            "hidden_size": 14336,
            "n_layer": 70,
            "n_head": 112,
            "vocab_size": 250880,
            "use_cache": False,
            "dtype": "bfloat16",
        },
        "BigScience 2022, BLOOM, table 3",
    ),
    "bert-large": ZooModel(
        "BertForMaskedLM",
        "BertConfig",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "vocab_size": 30522,
            "max_position_embeddings": 512,
        },
        "Devlin et al. 2018, section 3",
    ),
    "vit-22b": ZooModel(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 48,
            "intermediate_size": 24576,
            "image_size": 224,
            "patch_size": 14,
            "num_labels": 1000,
            "dtype": "bfloat16",
        },
        "Dehghani et al. 2023, Scaling Vision Transformers to 22 Billion Parameters, table 1: its shape, with "
        "attention and MLP one after the other and without normalized queries and keys",
    ),
}

ZOO: dict[str, ZooModel] = {**_LLAMAS, **_MISTRALS, **_QWENS, **_GPTS, **_OTHERS}
