"""Tiny models of many families, unmodified, with random weights: seeded, float64, no dropout, a loss of their own.

Each returns (model, (args, kwargs)). The batch is 8 and every dim that a plan may cut divides by 8 where the
family allows it. `NAMED` are the families that the project promises; `OTHERS` keep its rules general.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests import vision
from tests.models import BATCH, HIDDEN, SEQ, VOCAB, ModelAndInputs, next_token_loss, tiny_bert, tiny_llama, tiny_mlp

Family = Callable[[], ModelAndInputs]
HEADS, WIDE = 8, 128
IMAGE = 16

_WIDTHS: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_attention_heads": HEADS}
_TEXT: dict[str, Any] = {**_WIDTHS, "vocab_size": VOCAB, "num_hidden_layers": 1, "max_position_embeddings": 64}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _tokens(high: int = VOCAB, length: int = SEQ) -> torch.Tensor:
    return torch.randint(3, high, (BATCH, length))


def _images(size: int = IMAGE, channels: int = 3) -> torch.Tensor:
    return torch.randn(BATCH, channels, size, size, dtype=torch.float64)


def _seeded(make: Family) -> ModelAndInputs:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def _transformer(kind: str, inputs: Callable[[], dict[str, Any]], **config: Any) -> Family:
    """A model of transformers by the name of its class; its config is found by the class."""

    def make() -> ModelAndInputs:
        import transformers

        cls = getattr(transformers, kind)
        model = cls(cls.config_class(**config)).double()
        return model, ((), inputs())

    return lambda: _seeded(make)


def causal(kind: str, **config: Any) -> Family:
    """A causal language model; its loss in float64, as in `tests.models.tiny_llama`."""

    def make() -> ModelAndInputs:
        ids = _tokens()
        model, call = _transformer(kind, lambda: {"input_ids": ids, "labels": ids.clone()}, use_cache=False, **config)()
        model.loss_function = next_token_loss  # type: ignore[assignment]
        return model, call

    return lambda: _seeded(make)


def _masked(kind: str, padded: bool = True, **config: Any) -> Family:
    """A masked language model, with a padding mask and labels on every fourth token."""

    def inputs() -> dict[str, torch.Tensor]:
        ids = _tokens()
        mask = torch.ones(BATCH, SEQ, dtype=torch.long)
        if padded:
            mask[1::2, -4:] = 0
        labels = torch.where((torch.arange(SEQ) % 4 == 0) & (mask == 1), ids, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return _transformer(kind, inputs, **config)


def _classifier(kind: str, size: int = IMAGE, **config: Any) -> Family:
    """An image classifier of 16 classes."""

    def inputs() -> dict[str, torch.Tensor]:
        return {"pixel_values": _images(size), "labels": torch.randint(0, 16, (BATCH,))}

    return _transformer(kind, inputs, num_labels=16, **config)


def _sequences(length: int = SEQ) -> dict[str, torch.Tensor]:
    """Source and target of a sequence-to-sequence model."""
    source = _tokens(length=length)
    mask = torch.ones_like(source)
    mask[1::2, -4:] = 0
    return {"input_ids": source, "attention_mask": mask, "labels": _tokens()}


def _module(cls: Callable[[], nn.Module], inputs: Callable[[], tuple[torch.Tensor, ...]]) -> Family:
    """A plain module, called with positional arguments."""
    return lambda: _seeded(lambda: (cls().double(), (inputs(), {})))


def _labelled_images(size: int = IMAGE) -> tuple[torch.Tensor, ...]:
    return _images(size), torch.randint(0, 16, (BATCH,))


def _frozen_features(kind: str, inputs: Callable[[], dict[str, Any]], **config: Any) -> Family:
    """A speech model whose feature encoder is not trained."""

    def make() -> ModelAndInputs:
        model, call = _transformer(kind, inputs, **config)()
        model.freeze_feature_encoder()  # type: ignore[operator]
        return model, call

    return make


def _clip() -> dict[str, Any]:
    return {"input_ids": _tokens(), "pixel_values": _images(), "return_loss": True}


def _image_in_text() -> dict[str, torch.Tensor]:
    """A prompt with places (token 2) for the features of an image, and labels on the text behind them."""
    places = torch.full((BATCH, (IMAGE // 4) ** 2), 2)
    text = _tokens()
    labels = torch.cat([places.new_full(places.shape, -100), text], 1)
    return {"input_ids": torch.cat([places, text], 1), "pixel_values": _images(), "labels": labels}


def _segments() -> dict[str, torch.Tensor]:
    return {"pixel_values": _images(32), "labels": torch.randint(0, 16, (BATCH, 32, 32))}


def _speech() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(BATCH, 8, 32, dtype=torch.float64), "labels": _tokens()}


_VISION: dict[str, Any] = {**_WIDTHS, "num_hidden_layers": 1, "image_size": IMAGE, "patch_size": 4}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": WIDE,
    "decoder_ffn_dim": WIDE,
    "dropout": 0.0,
    **_TOKENS,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": WIDE,
    "num_layers": 1,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_EXPERTS: dict[str, Any] = {"experts_implementation": "batched_mm"}

NAMED: dict[str, Family] = {
    "llama": lambda: tiny_llama(layers=1),
    "qwen3": causal("Qwen3ForCausalLM", **_TEXT, num_key_value_heads=HEADS, head_dim=8),
    "mistral": causal("MistralForCausalLM", **_TEXT, num_key_value_heads=HEADS, sliding_window=8),
    "gemma3": causal(
        "Gemma3ForCausalLM",
        **(_TEXT | {"num_hidden_layers": 2}),
        num_key_value_heads=HEADS,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        **_TOKENS,
    ),
    "phi": causal("PhiForCausalLM", **_TEXT, num_key_value_heads=HEADS),
    "olmo2": causal("Olmo2ForCausalLM", **_TEXT, num_key_value_heads=HEADS),
    "gpt2": causal(
        "GPT2LMHeadModel", vocab_size=VOCAB, n_embd=HIDDEN, n_layer=1, n_head=HEADS, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "gpt_neox": causal("GPTNeoXForCausalLM", **_TEXT),
    "opt": causal(
        "OPTForCausalLM", vocab_size=VOCAB, hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=WIDE,
        num_hidden_layers=1, num_attention_heads=HEADS, max_position_embeddings=64, dropout=0.0, attention_dropout=0.0,
    ),
    "bert": lambda: tiny_bert(layers=1),
    "vit": _classifier("ViTForImageClassification", **_VISION, **_NO_DROPOUT),
    "t5": _transformer("T5ForConditionalGeneration", _sequences, **_T5),
    "mixtral": causal(
        "MixtralForCausalLM", **_TEXT, num_key_value_heads=HEADS, num_local_experts=8, num_experts_per_tok=2, **_EXPERTS
    ),
    "mamba": causal(
        "MambaForCausalLM", vocab_size=VOCAB, hidden_size=HIDDEN, state_size=8, num_hidden_layers=1, time_step_rank=8
    ),
    "resnet": _module(vision.ResNet, lambda: _labelled_images(32)),
    "unet": _module(vision.UNet, lambda: (_images(), torch.randint(0, 1000, (BATCH,)), _images())),
    "mlp": tiny_mlp,
}  # fmt: skip

OTHERS: dict[str, Family] = {
    "falcon": causal(
        "FalconForCausalLM", vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS,
        num_kv_heads=HEADS, new_decoder_architecture=True,
    ),
    "bloom": causal("BloomForCausalLM", vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=1, n_head=HEADS),
    "gptj": causal(
        "GPTJForCausalLM", vocab_size=VOCAB, n_embd=HIDDEN, n_layer=1, n_head=HEADS, n_positions=64, rotary_dim=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "qwen2_moe": causal(
        "Qwen2MoeForCausalLM", **_TEXT, num_key_value_heads=HEADS, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=64, output_router_logits=True, **_EXPERTS,
    ),
    "deepseek_v3": causal(
        "DeepseekV3ForCausalLM", **_TEXT, num_key_value_heads=HEADS, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=32, first_k_dense_replace=0, n_shared_experts=1, **_EXPERTS,
    ),
    "gpt_oss": causal(
        "GptOssForCausalLM", **_TEXT, num_key_value_heads=HEADS, head_dim=8, num_local_experts=8,
        num_experts_per_tok=2, sliding_window=8, **_EXPERTS,
    ),
    "mamba2": causal(
        "Mamba2ForCausalLM", vocab_size=VOCAB, hidden_size=HIDDEN, state_size=8, num_hidden_layers=1, num_heads=16,
        head_dim=8, n_groups=8, chunk_size=8,
    ),
    "roberta": _masked("RobertaForMaskedLM", **_TEXT, **_NO_DROPOUT),
    "distilbert": _masked(
        "DistilBertForMaskedLM", vocab_size=VOCAB, dim=HIDDEN, hidden_dim=WIDE, n_layers=1, n_heads=HEADS, dropout=0.0,
        attention_dropout=0.0, max_position_embeddings=64,
    ),
    "electra": _masked("ElectraForMaskedLM", **_TEXT, embedding_size=32, **_NO_DROPOUT),
    "albert": _masked("AlbertForMaskedLM", **_TEXT, embedding_size=32, classifier_dropout_prob=0.0, **_NO_DROPOUT),
    "deberta_v2": _masked(
        "DebertaV2ForMaskedLM", **_TEXT, **_NO_DROPOUT, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_buckets=8, max_relative_positions=16,
    ),
    "modernbert": _masked("ModernBertForMaskedLM", **_TEXT, padded=False, global_attn_every_n_layers=2, **_TOKENS,
        cls_token_id=1, sep_token_id=2),
    "bart": _transformer("BartForConditionalGeneration", _sequences, **_SEQ2SEQ, max_position_embeddings=64),
    "whisper": _transformer(
        "WhisperForConditionalGeneration", _speech, **_SEQ2SEQ, num_mel_bins=8, max_source_positions=16,
        max_target_positions=64, decoder_start_token_id=1,
    ),
    "clip": _transformer(
        "CLIPModel", _clip, projection_dim=32, text_config={**_TEXT, **_TOKENS}, vision_config={**_VISION},
    ),
    "deit": _classifier("DeiTForImageClassification", **_VISION, **_NO_DROPOUT),
    "swin": _classifier(
        "SwinForImageClassification", image_size=32, size=32, patch_size=2, embed_dim=32, depths=[2, 1],
        num_heads=[2, 4], window_size=4, drop_path_rate=0.0, **_NO_DROPOUT,
    ),
    "convnext": _classifier(
        "ConvNextForImageClassification", size=32, image_size=32, patch_size=2, num_stages=2, hidden_sizes=[16, 32],
        depths=[1, 1], layer_scale_init_value=0.5,
    ),
    "wav2vec2": _frozen_features(
        "Wav2Vec2ForSequenceClassification", lambda: {
            "input_values": torch.randn(BATCH, 320, dtype=torch.float64), "labels": torch.randint(0, 8, (BATCH,))
        }, **_WIDTHS, num_hidden_layers=1, vocab_size=32, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 4),
        num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
        apply_spec_augment=False, num_labels=8, classifier_proj_size=32,
    ),
    "mobilenet": _module(vision.MobileNet, lambda: _labelled_images(32)),
    "convnet1d": _module(
        vision.ConvNet1d,
        lambda: (torch.randn(BATCH, 1, 128, dtype=torch.float64), torch.rand(BATCH, 8, dtype=torch.float64)),
    ),
    "upnet": _module(vision.UpNet, lambda: (_images(), torch.randint(0, 8, (BATCH, IMAGE, IMAGE)))),
    "lstm": _module(vision.Recurrent, lambda: (_tokens(64, 4), _tokens(64, 4))),
    "encoder_decoder": _module(vision.EncoderDecoder, lambda: (_padded(64), _tokens(64))),
    "llava": _transformer(
        "LlavaForConditionalGeneration", _image_in_text, image_token_id=2, vision_feature_layer=-1,
        text_config={"model_type": "llama", **_TEXT, "num_key_value_heads": HEADS, "use_cache": False},
        vision_config={"model_type": "clip_vision_model", **_VISION, "projection_dim": 32},
    ),
    "siglip": _transformer(
        "SiglipModel", _clip, text_config={**_TEXT, **_TOKENS, "projection_size": HIDDEN}, vision_config={**_VISION},
    ),
    "segformer": _transformer(
        "SegformerForSemanticSegmentation", _segments, num_labels=16, num_encoder_blocks=2, depths=[1, 1],
        sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, 4],
        mlp_ratios=[2, 2], decoder_hidden_size=32, drop_path_rate=0.0, classifier_dropout_prob=0.0, **_NO_DROPOUT,
    ),
}  # fmt: skip

FAMILIES = {**NAMED, **OTHERS}

_BATCHED = '`experts_implementation="batched_mm"` or `"grouped_mm"`: which rows an expert gets must not decide shapes'
REMARKS: dict[str, str] = {
    "mixtral": _BATCHED,
    "qwen2_moe": _BATCHED,
    "deepseek_v3": _BATCHED,
    "gpt_oss": _BATCHED,
    "lstm": "unrolled over the sequence",
    "mamba": "the scan in plain PyTorch, unrolled over the sequence",
    "mamba2": "the chunked scan in plain PyTorch",
    "resnet": "batch statistics are those of the global batch",
    "mobilenet": "depthwise convolutions; batch statistics are those of the global batch",
    "swin": "`as_strided` and its gradient read memory by strides and run whole",
    "llava": "the image's features are put into the text by `masked_scatter`, which runs whole",
    "wav2vec2": "after `freeze_feature_encoder()`: its feature encoder sets `requires_grad` while it runs",
}


def _padded(high: int) -> torch.Tensor:
    tokens = _tokens(high)
    tokens[1::2, -4:] = 0
    return tokens
