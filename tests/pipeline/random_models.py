"""Random small models in repeated blocks, float64, for any batch size: what pipelines are cut out of.

`random_blocks(seed)` gives the same model and inputs for the same seed. Dims are multiples of 4, so that any of them
may be cut on a mesh of 4.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

SEQ, HIDDEN, VOCAB = 8, 8, 16


class Attention(nn.Module):
    """Causal or whole attention by torch's fused op, with grouped queries or without."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.heads, self.groups, self.causal = 4, rng.choice((1, 2)), rng.random() < 0.7
        self.q, self.out = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
        width = HIDDEN // self.groups
        self.k, self.v = nn.Linear(HIDDEN, width, bias=False), nn.Linear(HIDDEN, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = HIDDEN // self.heads
        q, k, v = (p.unflatten(-1, (-1, size)).transpose(1, 2) for p in (self.q(x), self.k(x), self.v(x)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.groups > 1)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Dense(nn.Module):
    """A layer of two products, the first one gated or not."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.gated = rng.random() < 0.5
        self.up, self.down = nn.Linear(HIDDEN, 16), nn.Linear(8 if self.gated else 16, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return self.down(F.glu(y) if self.gated else F.gelu(y))


class Experts(nn.Module):
    """Four experts, each token weighing all of them or the best two."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 4, bias=False)
        self.up = nn.Parameter(0.3 * torch.randn(4, HIDDEN, 8))
        self.down = nn.Parameter(0.3 * torch.randn(4, 8, HIDDEN))
        self.best = rng.random() < 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        shares = self.router(tokens).softmax(-1)
        if self.best:
            values, index = shares.topk(2, -1)
            shares = torch.zeros_like(shares).scatter(1, index, values)
        made = torch.bmm(F.silu(torch.bmm(tokens.expand(4, -1, -1), self.up)), self.down)
        return (made * shares.t().unsqueeze(-1)).sum(0).view_as(x)


class Block(nn.Module):
    """x + part(norm(x)); `beside` (what an early block made) is added, or not."""

    def __init__(self, rng: random.Random, part: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.part = nn.LayerNorm(HIDDEN), part(rng)  # type: ignore[call-arg]
        self.looks_back = rng.random() < 0.4

    def forward(self, x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
        made = x + self.part(self.norm(x))
        return made + beside.tanh() if self.looks_back else made


class Blocks(nn.Module):
    """Embedding, blocks, norm and a head that may be the embedding's; a loss over tokens that count, or a mean."""

    def __init__(self, rng: random.Random, count: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        kinds = [rng.choice((Attention, Dense, Experts)) for _ in range(count)]
        self.layers = nn.ModuleList(Block(rng, kind) for kind in kinds)
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        if rng.random() < 0.4:
            self.head.weight = self.embed.weight
        self.loss = rng.choice(("tokens", "mean", "sum"))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        beside = x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, beside)
        scores = self.head(self.norm(x))
        if self.loss == "mean":
            return scores.square().mean()
        kept = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
        return kept if self.loss == "sum" else F.cross_entropy(scores.flatten(0, 1), labels.flatten())


def random_blocks(seed: int, count: int, batch: int) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """A model of `count` blocks and a batch, in which some labels don't count."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = Blocks(rng, count).double()
    ids, labels = torch.randint(VOCAB, (batch, SEQ)), torch.randint(VOCAB, (batch, SEQ))
    labels[torch.rand(batch, SEQ) < 0.3] = -100
    return model, ((), {"ids": ids, "labels": labels})
