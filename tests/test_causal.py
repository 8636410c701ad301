"""Masks that only look back become causal attention, with the same numbers; all other masks stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autopar import zoo
from autopar._torch_compat import pytree
from autopar.models import example_inputs, load_model
from autopar.trace import Trace, trace
from autopar.tracing.causal import _BACKWARD, _FORWARD

SEQ = 16


def attention_nodes(traced: Trace) -> list[Any]:
    return [n for n in traced.graph_module.graph.nodes if n.target in (_FORWARD, _BACKWARD)]


def is_causal(node: Any) -> bool:
    place = 4 if node.target is _FORWARD else 7
    return len(node.args) > place and bool(node.args[place])


class Masked(nn.Module):
    """Attention on itself with a mask that `make(positions of keys, positions of queries, input)` returns."""

    def __init__(self, make: Callable[..., torch.Tensor], keys: int = SEQ) -> None:
        super().__init__()
        self.make, self.keys = make, keys
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = (x * self.weight).unsqueeze(1)
        k = q[:, :, : self.keys]
        key, query = torch.arange(self.keys)[None, :], torch.arange(SEQ)[:, None]
        out = F.scaled_dot_product_attention(q, k, k, attn_mask=self.make(key, query, x))
        return out.square().sum()


def traced(make: Callable[..., torch.Tensor], keys: int = SEQ) -> Trace:
    return trace(Masked(make, keys), ((torch.ones(2, SEQ, 8),), {}))


def bias(condition: torch.Tensor, hidden: float) -> torch.Tensor:
    return torch.where(condition, torch.full((), 0.0), torch.full((), hidden))


LOWEST = torch.finfo(torch.float32).min
CAUSAL: dict[str, Callable[..., torch.Tensor]] = {
    "le": lambda k, q, x: bias(k <= q, -torch.inf),
    "ge": lambda k, q, x: bias(q >= k, LOWEST),
    "and true": lambda k, q, x: bias((k <= q) & torch.ones(1, 1, dtype=torch.bool), -torch.inf),
    "wide window": lambda k, q, x: bias((k <= q) & (k > q - SEQ), -torch.inf),
    "one sequence": lambda k, q, x: bias((k <= q) & (k * 0 == q * 0), -torch.inf),
    "expanded": lambda k, q, x: bias((k <= q)[None, None].expand(2, 1, SEQ, SEQ), -torch.inf),
}
OTHERS: dict[str, Callable[..., torch.Tensor]] = {
    "lt": lambda k, q, x: bias((k < q) | (k == 0), -torch.inf),
    "forward": lambda k, q, x: bias(q <= k, -torch.inf),
    "shifted": lambda k, q, x: bias(k <= q + 1, -torch.inf),
    "two sequences": lambda k, q, x: bias((k <= q) & ((k > 7) == (q > 7)), -torch.inf),
    "small": lambda k, q, x: bias(k <= q, -1.0),
    "upside down": lambda k, q, x: torch.where(k <= q, torch.full((), -torch.inf), torch.full((), 0.0)),
    "of the input": lambda k, q, x: bias((k <= q) & (x[:, None, None, :, 0] > 0), -torch.inf),
    "window of the future": lambda k, q, x: bias((q <= k) & (k < q + 4), -torch.inf),
    "everything": lambda k, q, x: bias(k < q + SEQ, -torch.inf),
}


WINDOWS: dict[str, tuple[int, Callable[..., torch.Tensor]]] = {
    "gt": (4, lambda k, q, x: bias((k <= q) & (k > q - 4), -torch.inf)),
    "ge": (5, lambda k, q, x: bias((q >= k) & (k >= q - 4), LOWEST)),
    "distance": (3, lambda k, q, x: bias((k <= q) & (q < k + 3) & (k > q - 9), -torch.inf)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_computed_without_a_mask(name: str) -> None:
    window, make = WINDOWS[name]
    nodes = [n for n in traced(make).graph_module.graph.nodes if "block_attention" in str(n.target)]
    assert [n.args[n.args.index(True) + 1] for n in nodes] == [window, window]
    torch.manual_seed(0)
    model, x = Masked(make), torch.randn(2, SEQ, 8)
    loss = model(x)
    loss.backward()
    found = trace(model, ((x,), {})).graph_module(model.weight.detach(), x, torch.tensor(1.0))
    flat = [t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]
    assert any(t.shape == () and torch.allclose(t, loss.detach(), rtol=1e-6) for t in flat)
    assert any(t.shape == (8,) and torch.allclose(t, model.weight.grad, rtol=1e-5) for t in flat)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_masks_are_dropped(name: str) -> None:
    nodes = attention_nodes(traced(CAUSAL[name]))
    assert len(nodes) == 2 and all(is_causal(n) and "attn_mask" not in n.kwargs for n in nodes)


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_stay(name: str) -> None:
    nodes = attention_nodes(traced(OTHERS[name]))
    assert len(nodes) == 2 and not any(map(is_causal, nodes)) and all("attn_mask" in n.kwargs for n in nodes)


def test_fewer_keys_than_queries_keep_their_mask() -> None:
    nodes = attention_nodes(traced(CAUSAL["le"], keys=8))
    assert nodes and not any(map(is_causal, nodes))


@pytest.mark.parametrize("name", CAUSAL)
def test_numbers_are_the_same(name: str) -> None:
    torch.manual_seed(0)
    model, x = Masked(CAUSAL[name]), torch.randn(2, SEQ, 8)
    loss = model(x)
    loss.backward()
    traced_ = trace(model, ((x,), {}))
    found = traced_.graph_module(model.weight.detach(), x, torch.tensor(1.0))
    flat = [t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]
    assert any(t.shape == () and torch.equal(t, loss.detach()) for t in flat)
    assert any(t.shape == (8,) and torch.allclose(t, model.weight.grad, rtol=1e-6) for t in flat)  # type: ignore[arg-type]


class Narrow(nn.Module):
    """Attention with values of a third of the queries' width, as where keys carry positions beside what they say."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.project, self.dropout = nn.Linear(8, 12 + 12 + 4), dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unsqueeze(1).split([12, 12, 4], dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        assert out.shape[-1] == 4
        return out.square().sum()


def test_narrow_values_keep_attention_fused() -> None:
    torch.manual_seed(0)
    model, x = Narrow().double(), torch.randn(2, SEQ, 8, dtype=torch.float64)
    found = trace(model, ((x,), {}))
    assert len(attention_nodes(found)) == 2
    loss = model(x)
    loss.backward()
    made = found.graph_module(*(p.detach() for p in model.parameters()), x, torch.tensor(1.0, dtype=torch.float64))
    flat = [t for t in pytree.tree_leaves(made) if isinstance(t, torch.Tensor)]
    for expected in (loss.detach(), *(p.grad for p in model.parameters())):
        assert any(t.shape == expected.shape and torch.allclose(t, expected, rtol=1e-12) for t in flat)
    assert not attention_nodes(trace(Narrow(dropout=0.5).double(), ((x,), {})))  # the fused kernel knows no dropout


@pytest.mark.parametrize(
    ("name", "batch", "seq"), [("tiny-llama", 2, 64), ("mistral-7b", 2, 64), ("tiny-llama", 13, 1 << 17)]
)
def test_transformers(name: str, batch: int, seq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = zoo.ZOO[name]
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    monkeypatch.setitem(zoo.ZOO, "small", dataclasses.replace(entry, config={**entry.config, **small}))
    model = load_model("small", attention="sdpa")
    nodes = attention_nodes(trace(model, example_inputs(model, batch, seq)))
    assert len(nodes) == 4 and all(map(is_causal, nodes))
