"""Attention that is written out becomes one op where that is the same function, and only there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autopar._torch_compat import pytree
from autopar.trace import Trace, trace, trace_sample
from autopar.tracing.causal import _BACKWARD, _FORWARD, _WINDOWED
from autopar.tracing.written_attention import is_marked

BATCH, HEADS, SEQ, WIDTH = 2, 4, 8, 4
Tensor = torch.Tensor
Written = Callable[[Tensor, Tensor, Tensor, "Hand"], Tensor]


class Hand(nn.Module):
    """Attention as `write` writes it: from queries, keys and values of one product to what they give."""

    def __init__(self, write: Written, key_heads: int = HEADS) -> None:
        super().__init__()
        self.write, self.key_heads = write, key_heads
        self.project = nn.Linear(HEADS * WIDTH, (HEADS + 2 * key_heads) * WIDTH)
        self.learned = nn.Parameter(torch.randn(SEQ, SEQ) / 9)
        self.heat = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("kept", torch.tril(torch.ones(SEQ + 4, SEQ + 4)).view(1, 1, SEQ + 4, SEQ + 4))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        self.padding = padding
        rows = self.project(x).view(BATCH, SEQ, -1, WIDTH)
        q, k, v = (t.transpose(1, 2) for t in rows.split([HEADS, self.key_heads, self.key_heads], dim=2))
        made = self.write(q, k, v, self)
        out, *others = made if isinstance(made, tuple) else (made,)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum(), *others


class Several(nn.Module):
    """One of each, in one trace."""

    def __init__(self, writes: Mapping[str, Written]) -> None:
        super().__init__()
        self.each = nn.ModuleDict(
            {name: Hand(w, 2 if name == "repeated keys" else HEADS) for name, w in writes.items()}
        )

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
        made = [module(x, padding) for module in self.each.values()]
        return torch.stack([loss for loss, *_ in made]).sum(), *(other for _, *others in made for other in others)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * WIDTH**-0.5


def later() -> Tensor:
    """[query, key]: whether a key comes after a query."""
    return torch.arange(SEQ)[None, :] > torch.arange(SEQ)[:, None]


def in_place(q: Tensor, k: Tensor, v: Tensor, m: Hand) -> Tensor:
    s = q @ k.transpose(-1, -2)
    s /= math.sqrt(WIDTH)
    s.masked_fill_(later(), -torch.inf)
    return F.dropout(torch.softmax(s, -1), 0.3, training=False) @ v


def flat_heads(q: Tensor, k: Tensor, v: Tensor, m: Hand) -> Tensor:
    q, k, v = (t.reshape(-1, SEQ, WIDTH) for t in (q, k, v))
    return torch.bmm(F.softmax(torch.bmm(q, k.mT) / 2, dim=2), v)


def added_to_filled(q: Tensor, k: Tensor, v: Tensor, m: Hand) -> Tensor:
    s = torch.where(later(), torch.tensor(-torch.inf, dtype=q.dtype), scores(q, k))
    return (s + m.padding).softmax(-1) @ v  # type: ignore[operator]


def repeated(q: Tensor, k: Tensor, v: Tensor, m: Hand) -> Tensor:
    k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(BATCH, -1, SEQ, WIDTH) for t in (k, v))
    return scores(q, k).softmax(-1) @ v


def filled(value: float) -> Written:
    return lambda q, k, v, m: F.softmax(scores(q, k).masked_fill(later(), value), dim=-1) @ v


def nano(q: Tensor, k: Tensor, v: Tensor, m: Hand) -> Tensor:
    att = scores(q, k).masked_fill(m.kept[:, :, :SEQ, :SEQ] == 0, float("-inf"))  # type: ignore[index]
    return m.drop(F.softmax(att, dim=-1)) @ v


def in_float32(q: Tensor, k: Tensor, v: Tensor, m: Hand) -> Tensor:
    return F.softmax(scores(q, k), -1, dtype=torch.float32).to(q.dtype) @ v


JOINED: dict[str, Written] = {
    "plain": lambda q, k, v, m: scores(q, k).softmax(-1) @ v,
    "unscaled": lambda q, k, v, m: torch.matmul((q @ k.mT).softmax(dim=3), v),
    "scaled by a tensor": lambda q, k, v, m: (q @ k.mT / torch.tensor(3.0, dtype=q.dtype)).softmax(-1) @ v,
    "scaled by a parameter": lambda q, k, v, m: (m.heat * (q @ k.mT)).softmax(-1) @ v,
    "queries scaled": lambda q, k, v, m: ((q / 2) @ k.mT).softmax(-1) @ v,
    "turned keys": lambda q, k, v, m: (q @ (k * 2).permute(0, 1, 3, 2)).softmax(-1) @ v,
    "padding": lambda q, k, v, m: (scores(q, k) + m.padding).softmax(-1) @ v,  # type: ignore[operator]
    "filled by an input": lambda q, k, v, m: (
        scores(q, k).masked_fill(m.padding < 0, -1e9).softmax(-1) @ v  # type: ignore[operator]
    ),
    "buffer": nano,
    "flat heads": flat_heads,
    "added to filled": added_to_filled,
    "repeated keys": repeated,
}
CAUSAL: dict[str, Written] = {
    "filled": filled(-torch.inf),
    "filled with a low number": filled(-1e9),
    "in place": in_place,
    "triu": lambda q, k, v, m: (scores(q, k) + torch.full((SEQ, SEQ), -torch.inf).triu(1)).softmax(-1) @ v,
    "tril": lambda q, k, v, m: (
        scores(q, k).masked_fill(torch.ones(SEQ, SEQ).tril() == 0, torch.finfo(q.dtype).min).softmax(-1) @ v
    ),
}
OTHERS: dict[str, Written] = {
    "over queries": lambda q, k, v, m: scores(q, k).softmax(-2) @ v,
    "capped": lambda q, k, v, m: (scores(q, k) / 5).tanh().mul(5).softmax(-1) @ v,
    "sink": lambda q, k, v, m: F.pad(scores(q, k), (1, 0)).softmax(-1)[..., 1:] @ v,
    "weights returned": lambda q, k, v, m: ((w := scores(q, k).softmax(-1)) @ v, w),  # type: ignore[dict-item,return-value]
    "scores returned": lambda q, k, v, m: ((s := scores(q, k)).softmax(-1) @ v, s),  # type: ignore[dict-item,return-value]
    "weights used twice": lambda q, k, v, m: (w := scores(q, k).softmax(-1)) @ (w @ v),
    "learned mask": lambda q, k, v, m: (scores(q, k) + m.learned).softmax(-1) @ v,
    "scales of a row each": lambda q, k, v, m: (scores(q, k) * torch.arange(SEQ)[:, None]).softmax(-1) @ v,
    "mask scaled": lambda q, k, v, m: ((q @ k.mT + m.padding) * 0.5).softmax(-1) @ v,  # type: ignore[operator]
    "negative scale": lambda q, k, v, m: (q @ k.mT * -1).softmax(-1) @ v,
    "filled with a number": filled(-1.0),
    "rows filled whole": lambda q, k, v, m: (
        scores(q, k).masked_fill(torch.arange(SEQ)[:, None] > 4, -1e9).softmax(-1) @ v
    ),
    "rounded": lambda q, k, v, m: scores(q, k).bfloat16().softmax(-1).to(q.dtype) @ v,
    "not normalized": lambda q, k, v, m: scores(q, k).exp() @ v,
    "queries changed between": lambda q, k, v, m: _changed(q, k, v),
}


def _changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1.5
    s = scores(q, k)
    q.mul_(2)
    return s.softmax(-1) @ v + q


def call(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    padding = torch.zeros(BATCH, 1, 1, SEQ, dtype=dtype)
    padding[1, ..., 5:] = torch.finfo(dtype).min
    return (torch.randn(BATCH, SEQ, HEADS * WIDTH, dtype=dtype), padding), {}


def attention_nodes(traced: Trace) -> list[Any]:
    found = [n for n in traced.graph_module.graph.nodes if n.target in (_FORWARD, _BACKWARD, _WINDOWED)]
    assert all(is_marked(n) for n in found)
    return found


def has_scores(traced: Trace) -> bool:
    """Whether the trace makes a number for every pair of tokens of every head."""
    values = [n.meta.get("val") for n in traced.graph_module.graph.nodes]
    square = [v for v in values if isinstance(v, Tensor) and v.shape[-2:] == (SEQ, SEQ)]
    return any(v.numel() >= BATCH * HEADS * SEQ * SEQ for v in square)


def run(model: nn.Module, traced: Trace, inputs: Any) -> dict[str, Tensor]:
    """What the trace gives, by node."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    values = [named[i.fqn].detach() for i in (*traced.params, *traced.buffers)]
    values += [c.value for c in traced.constants]  # type: ignore[misc]
    values += [dict(zip(("x", "padding"), inputs[0], strict=True))[i.path] for i in traced.inputs]
    results = traced.graph_module(*values, torch.ones((), dtype=inputs[0][0].dtype))
    return dict(zip(traced.results, [t for t in pytree.tree_leaves(results) if t is not None], strict=True))


def assert_equal(model: nn.Module, traced: Trace, inputs: Any, tolerance: float) -> None:
    loss = model(*inputs[0])[0]
    loss.backward()
    made, params = run(model, traced, inputs), dict(model.named_parameters())
    assert traced.loss is not None
    torch.testing.assert_close(made[traced.loss], loss.detach(), rtol=tolerance, atol=tolerance)
    for fqn, node in traced.grads.items():
        torch.testing.assert_close(made[node], params[fqn].grad, rtol=tolerance, atol=tolerance)


def test_joined_with_the_same_numbers() -> None:
    model, inputs = Several({**JOINED, **CAUSAL}).double(), call()
    traced = trace(model, inputs)
    nodes = {n.meta["module_path"]: n for n in attention_nodes(traced) if n.target is _FORWARD}
    assert set(nodes) == {f"each.{name}" for name in (*JOINED, *CAUSAL)} and not has_scores(traced)
    assert {path for path, n in nodes.items() if n.args[4:5] == (True,)} == {f"each.{name}" for name in CAUSAL}
    heads = {path: n.args[1].meta["val"].shape[1] for path, n in nodes.items()}
    assert {p: h for p, h in heads.items() if h != HEADS} == {"each.flat heads": 1, "each.repeated keys": 2}
    assert_equal(model, traced, inputs, 1e-12)


def test_softmax_in_float32_of_float64_is_as_good_as_that() -> None:
    model, inputs = Hand(in_float32).double(), call()
    traced = trace(model, inputs)
    assert len(attention_nodes(traced)) == 2
    assert_equal(model, traced, inputs, 1e-6)


def test_what_is_another_function_stays() -> None:
    model, inputs = Several(OTHERS).double(), call()
    traced = trace(model, inputs)
    assert not {n.meta["module_path"] for n in attention_nodes(traced)}
    assert_equal(model, traced, inputs, 1e-12)


def test_dropout_of_weights_stays() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor, m: Hand) -> Tensor:
        return F.dropout(scores(q, k).softmax(-1), 0.5, training=True) @ v

    assert not attention_nodes(trace(Hand(dropped), call(torch.float32)))


def test_a_window_is_seen() -> None:
    def window(q: Tensor, k: Tensor, v: Tensor, m: Hand) -> Tensor:
        key, query = torch.arange(SEQ)[None, :], torch.arange(SEQ)[:, None]
        return scores(q, k).masked_fill((key > query) | (key <= query - 3), -torch.inf).softmax(-1) @ v

    model, inputs = Hand(window).double(), call()
    traced = trace(model, inputs)
    (node,) = attention_nodes(traced)
    assert node.target is _WINDOWED and node.args[node.args.index(True) + 1] == 3
    assert_equal(model, traced, inputs, 1e-12)


def test_a_sample_of_which_all_is_hidden_gives_nothing() -> None:
    """As under sdpa, and no gradient."""

    def padded(q: Tensor, k: Tensor, v: Tensor, m: Hand) -> Tensor:
        shown = m.padding == 0
        nothing, lowest = (torch.full((), n, dtype=q.dtype) for n in (0.0, torch.finfo(q.dtype).min))
        return (scores(q, k) + torch.where(shown, nothing, lowest)).softmax(-1) @ v

    model, inputs = Hand(padded).double(), call()
    traced = trace(model, inputs)
    assert attention_nodes(traced)
    assert_equal(model, traced, inputs, 1e-12)
    inputs[0][1][0] = -1
    found = run(model, traced, inputs)
    assert all(bool(t.isfinite().all()) for t in found.values())
    inputs[0][0][0] = 3.0
    torch.testing.assert_close(run(model, traced, inputs), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    model, inputs = Hand(in_float32).to(dtype), call(dtype)
    traced = trace(model, inputs)
    assert attention_nodes(traced)
    assert_equal(model, traced, inputs, 1e-5 if dtype == torch.float32 else 0.1)


def test_layouts_elsewhere_are_priced_as_it_is_written() -> None:
    model, inputs = Hand(JOINED["plain"]), call(torch.float32)
    assert not attention_nodes(trace_sample(model, inputs, as_written=True).trace)
    assert attention_nodes(trace_sample(model, inputs).trace)
