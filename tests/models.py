"""Tiny models that all tests share: seeded, float64, with their own loss, no dropout.

Each returns (model, (args, kwargs)). The batch is 8 and every dim that a plan may cut divides by 8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BATCH, SEQ, HIDDEN, VOCAB = 8, 16, 64, 256
ModelAndInputs = tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """The mean cross-entropy of the next token, in the dtype of the logits."""
    following = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    return nn.functional.cross_entropy(logits.view(-1, vocab_size), following.reshape(-1))


def tiny_llama(
    dtype: torch.dtype = torch.float64, layers: int = 2, kv_heads: int = 8, tied: bool = False, seed: int = 0
) -> ModelAndInputs:
    """A Llama from transformers: hidden 64, 8 heads, vocabulary 256, sequences of 16.

    transformers computes the loss of a causal language model in float32 whatever the dtype of the model. In
    float64 the model gets a loss in float64, through transformers' own `loss_function`, so that two orders of
    summation agree to more than seven digits.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
        if dtype == torch.float64:
            model.loss_function = next_token_loss
        ids = torch.randint(0, VOCAB, (BATCH, SEQ))
    return model, ((), {"input_ids": ids, "labels": ids.clone()})


def tiny_bert(dtype: torch.dtype = torch.float64, layers: int = 2, seed: int = 0) -> ModelAndInputs:
    """A BERT for masked language modelling, with a padding mask and labels on every fourth token."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForMaskedLM(config).to(dtype)
        ids = torch.randint(0, VOCAB, (BATCH, SEQ))
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[1::2, -4:] = 0
    labels = torch.where((torch.arange(SEQ) % 4 == 0) & (mask == 1), ids, -100)
    return model, ((), {"input_ids": ids, "attention_mask": mask, "labels": labels})


class TinyMLP(nn.Module):
    """Two linear layers with a scale buffer, a cast to float32 and back, and a nested result."""

    scale: torch.Tensor

    def __init__(self, width: int = HIDDEN, classes: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, classes)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width))

    def forward(self, x: torch.Tensor, *, target: torch.Tensor, temperature: float = 1.0) -> dict[str, Any]:
        """x: [batch, width]; target: [batch] class indices."""
        hidden = torch.nn.functional.gelu(self.up(x * self.scale))
        logits = self.down(hidden) / temperature
        loss = nn.functional.cross_entropy(logits, target)
        rounded = logits.to(torch.float32).to(logits.dtype)
        return {"loss": loss, "logits": logits, "aux": (rounded.argmax(-1), [hidden.mean(), None]), "name": "mlp"}


def tiny_mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> ModelAndInputs:
    """`TinyMLP` with a positional and two keyword arguments, one of them no tensor."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyMLP().to(dtype)
        x = torch.randn(BATCH, HIDDEN, dtype=dtype)
        target = torch.randint(0, 16, (BATCH,))
    return model, ((x,), {"target": target, "temperature": 2.0})
