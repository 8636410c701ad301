"""Random small models, float64: a few blocks of everyday layers on [batch, sequence, hidden], then a loss.

`random_model(seed)` gives the same model and inputs for the same seed. Every dim is a multiple of 4, so that
any of them may be cut on a mesh of 4.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

BATCH, SEQ, HIDDEN, HEADS, VOCAB = 4, 4, 8, 4, 16
ACTIVATIONS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (F.gelu, F.relu, F.silu, torch.tanh, torch.sigmoid)


class Dense(nn.Module):
    """x + out(activation(into(x))), with or without the residual."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        width = rng.choice((8, 16))
        self.into = nn.Linear(HIDDEN, width, bias=rng.random() < 0.5)
        self.out = nn.Linear(width, HIDDEN, bias=rng.random() < 0.5)
        self.activation, self.residual = rng.choice(ACTIVATIONS), rng.random() < 0.7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.out(self.activation(self.into(x)))
        return x + y if self.residual else y


class Gated(nn.Module):
    """A gated layer; the gate and the value are halves of one product, cut by chunk or by slices."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.both = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.slices = rng.random() < 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self.both(x)
        gate, value = (both[..., :HIDDEN], both[..., HIDDEN:]) if self.slices else both.chunk(2, dim=-1)
        return x + F.silu(gate) * value


class Norm(nn.Module):
    """Layer norm, or a root-mean-square norm written out."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.layer = nn.LayerNorm(HIDDEN) if rng.random() < 0.5 else None
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layer is not None:
            return self.layer(x) * self.weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Softmax attention with a causal mask, written out, from three products or one."""

    mask: torch.Tensor

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.joined = rng.random() < 0.5
        self.qkv = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=rng.random() < 0.5) for _ in range(3))
        self.packed = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.register_buffer("mask", torch.tril(torch.ones(SEQ, SEQ, dtype=torch.bool)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.packed(x).split(HIDDEN, dim=-1) if self.joined else [layer(x) for layer in self.qkv]
        q, k, v = (p.view(BATCH, SEQ, HEADS, -1).transpose(1, 2) for p in parts)
        scores = q @ k.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5
        weights = scores.masked_fill(~self.mask, float("-inf")).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(BATCH, SEQ, HIDDEN))


class Fused(nn.Module):
    """torch's scaled_dot_product_attention."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.into, self.causal = nn.Linear(HIDDEN, 3 * HIDDEN), rng.random() < 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.into(x).view(BATCH, SEQ, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=self.causal)
        return x + y.transpose(1, 2).flatten(2)


class Mixer(nn.Module):
    """A product along the sequence, through transpositions; or on tokens flattened into rows."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.flat = rng.random() < 0.5
        self.mix = nn.Linear(HIDDEN, HIDDEN) if self.flat else nn.Linear(SEQ, SEQ)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.flat:
            return self.mix(x.reshape(-1, HIDDEN)).reshape(x.shape) + x
        return x + self.mix(x.transpose(1, 2)).transpose(1, 2)


class Shuffle(nn.Module):
    """No parameters: rolls, means, concatenations and broadcasts."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.kind = rng.randrange(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == 0:
            return torch.cat([x[:, 1:], x[:, :1]], dim=1) + x
        if self.kind == 1:
            return x - x.mean(1, keepdim=True)
        if self.kind == 2:
            left, right = x.chunk(2, dim=-1)
            return torch.cat([right * torch.sigmoid(left), left], dim=-1)
        if self.kind == 3:
            return torch.where(x > 0, x, 0.1 * x) + x.amax(-1, keepdim=True).expand_as(x)
        return x.unsqueeze(2).expand(BATCH, SEQ, 2, HIDDEN).sum(2) / (1 + x.abs())


BLOCKS = (Dense, Gated, Norm, Attention, Fused, Mixer, Shuffle)


class RandomModel(nn.Module):
    """Embedding or float input, random blocks, one of four losses."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Parameter(torch.randn(SEQ, HIDDEN))
        self.from_ids = rng.random() < 0.6
        self.blocks = nn.ModuleList(rng.choice(BLOCKS)(rng) for _ in range(rng.randint(1, 3)))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=rng.random() < 0.5)
        if rng.random() < 0.3:
            self.head.weight = self.embedding.weight
        self.loss = rng.choice(("mean", "sum", "square", "cross_entropy", "cross_entropy"))

    def forward(self, x: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of x [batch, seq, hidden] or ids [batch, seq], labels [batch, seq]."""
        h = self.embedding(ids) if self.from_ids else x
        h = h + self.positions
        for block in self.blocks:
            h = block(h)
        logits = self.head(h)
        if self.loss == "mean":
            return logits.pow(2).mean()
        if self.loss == "sum":
            return (logits.softmax(-1) * logits).sum()
        if self.loss == "square":
            return F.mse_loss(logits, self.head(x))
        return F.cross_entropy(logits.view(-1, VOCAB), labels.view(-1), ignore_index=0)


def random_model(seed: int) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """(model, (args, kwargs)) of a seed."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RandomModel(rng).double()
        x = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64)
        ids = torch.randint(0, VOCAB, (BATCH, SEQ))
        labels = torch.randint(0, VOCAB, (BATCH, SEQ))
    return model, ((x, ids, labels), {})
