"""Attention that a model writes out, product, mask, softmax, product, becomes the one op that it is.

transformers' `attn_implementation="eager"` and most code written by hand keep a score for every pair of tokens. In
Dynamo's graph, before there is a backward pass, such a stretch is replaced by `scaled_dot_product_attention` where that
is the same function and a fused kernel takes it. So it is planned, cut and sent around as sdpa's own is.

Taken: any scale by a number or by a tensor of one number, masks as `autopar.tracing.written_masks` says, a softmax over
the keys in the dtype of the scores or a wider one or float32 (whose rounding of float64 is then spared), dropout that
drops nothing. Not taken: scores or weights that anything else reads, as where a model returns them; anything else
between the two products, as a cap on scores or a sink beside them; masks that are learned; dropout that draws.

The value of a buffer is not known here, as it may be loaded later: a mask that is kept in one stays a mask, though it
may be causal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from autopar.tracing.attention import widened
from autopar.tracing.rewrites import holds
from autopar.tracing.spelling import (
    argument,
    can_be_late,
    is_number,
    made,
    only_user,
    product,
    read_what_is_written,
    spelled,
    transposed,
)
from autopar.tracing.written_masks import Term, added, filled, fits, mask_of

MARK = "autopar_written_out"  # in meta["custom"] of the ops that written-out attention has become


def is_marked(node: fx.Node) -> bool:
    """Whether an op stands for attention that the model writes out."""
    return MARK in node.meta.get("custom", ())


def joined_attention(graph: fx.Graph) -> int:
    """How many times a trace has one op in place of attention that the model writes out."""
    return sum(is_marked(n) and n.meta["phase"] == "forward" and "attention" in str(n.target) for n in graph.nodes)


@dataclass(frozen=True)
class _Scores:
    """What happens to scores between product and softmax.

    factors: tensors of one number, and whether the scores are divided by them.
    """

    scale: float = 1.0
    factors: tuple[tuple[fx.Node, bool], ...] = ()
    terms: tuple[Term, ...] = ()


@dataclass(frozen=True)
class _Written:
    """One stretch of written-out attention.

    inner: its nodes, from the first product to what the last one takes; result: the last one.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    inner: tuple[fx.Node, ...]
    result: fx.Node
    scores: _Scores


def join_written_attention(graph: fx.Graph) -> None:
    """Replace each stretch of written-out attention in Dynamo's graph by one op."""
    read_what_is_written(graph)
    for node in list(graph.nodes):
        found = _written(node) if spelled(node) == "softmax" else None
        if found is not None and can_be_late((*found.inner, found.result)):
            _replace(found)


def _replace(found: _Written) -> None:
    product_of, key = made(found.inner[0]), transposed(found.key)
    assert product_of is not None
    scores = found.scores
    terms = tuple((t.tensor, t.hides) for t in scores.terms)
    args = (found.query, key or found.key, found.value, terms, scores.scale, scores.factors)
    kwargs: dict[str, Any] = {"dtype": product_of.dtype, "turned": key is None}
    if not _is_fused(args, kwargs):
        return
    graph, result = found.result.graph, found.result
    with graph.inserting_before(result):
        joined = graph.call_function(attention, args, kwargs)
    joined.meta = {**result.meta, "custom": {**result.meta.get("custom", {}), MARK: True}}
    result.replace_all_uses_with(joined)
    for node in (result, *reversed(found.inner)):
        graph.erase_node(node)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Sequence[tuple[torch.Tensor, bool | None]],
    scale: float,
    factors: Sequence[tuple[torch.Tensor, bool]],
    *,
    dtype: torch.dtype,
    turned: bool,
) -> torch.Tensor:
    """Attention of [batch, (head,) sequence, width]. dtype: of the scores. turned: key is [..., width, sequence]."""
    for factor, divides in factors:
        query = query / factor if divides else query * factor
    mask = mask_of(terms, dtype)
    key = key.transpose(-2, -1) if turned else key
    heads = query.dim() == 4
    if not heads:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    if mask is not None and mask.dim() in (1, 3):
        mask = mask.unsqueeze(1) if mask.dim() == 3 and not heads else mask.unsqueeze(0)
    args, kwargs = (query, key, value, mask), {"scale": scale}
    result: torch.Tensor = widened(scaled_dot_product_attention, args, kwargs)(*args, **kwargs)
    return result if heads else result.squeeze(1)


def _is_fused(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether torch has a fused kernel for these arguments on their device: its choice, made on fake tensors."""
    fakes: Any = fx.node.map_aggregate(args, lambda a: made(a) if isinstance(a, fx.Node) else a)
    query, key, value, terms, scale, factors = fakes
    with query.fake_mode, torch.enable_grad():
        q, k, v = (x.detach().to(kwargs["dtype"]).requires_grad_() for x in (query, key, value))
        result = attention(q, k, v, terms, scale, [(f.detach(), d) for f, d in factors], **kwargs)
        stack = [result.grad_fn]
        while stack:
            at = stack.pop()
            if at is None or "ScaledDotProduct" in at.name():
                return at is not None
            stack += [source for source, _ in at.next_functions if source is not None]
    return False


# -- reading ------------------------------------------------------------------------------


def _written(softmax: fx.Node) -> _Written | None:
    """What stands around a softmax, if that is attention."""
    weights = made(softmax)
    if weights is None or not softmax.args or argument(softmax, 1, "dim") not in (-1, weights.dim() - 1):
        return None
    above, below = _above(softmax.args[0], weights.shape), _below(softmax)
    if above is None or below is None:
        return None
    scores = _scores(above)
    query, key = product(above[-1]) or (None, None)
    weighed, value = product(below[-1]) or (None, None)
    if scores is None or query is None or key is None or weighed is None or value is None:
        return None
    found = _Written(query, key, value, (*reversed(above), softmax, *below[:-1]), below[-1], scores)
    return found if _dtypes_fit(found) else None


def _above(node: Any, shape: torch.Size) -> list[fx.Node] | None:
    """From above a softmax up to the product of queries and keys, each node of one shape and read by the next alone."""
    value = made(node)
    if value is None or value.shape != shape or only_user(node) is None:
        return None
    if product(node) is not None:
        return [node]
    ways = [_above(n, shape) for n in node.all_input_nodes] if spelled(node) else []
    found = [way for way in ways if way is not None]
    return [node, *found[0]] if len(found) == 1 else None


def _below(softmax: fx.Node) -> list[fx.Node] | None:
    """From below a softmax down to the product with the values, each node reading the one before it alone."""
    found, node = [], softmax
    while True:
        user = only_user(node)
        if user is None or not user.args or user.args[0] is not node:
            return None
        found.append(user)
        if product(user) is not None:
            return found
        if spelled(user) not in ("cast", "clone") and not _drops_nothing(user):
            return None
        node = user


def _drops_nothing(node: fx.Node) -> bool:
    if spelled(node) != "dropout":
        return False
    rate, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", node.kwargs.get("train", True))
    return training is False or (is_number(rate) and rate == 0)


def _scores(above: list[fx.Node]) -> _Scores | None:
    """What the nodes above a softmax do, the last one first; None if that is not all understood."""
    found = _Scores()
    for node, source in itertools.pairwise(above):
        step = _step(node, source)
        if step is None:
            return None
        scaled = found.scale != 1.0 or found.factors
        if step.terms and scaled:
            return None  # masks are scaled with the scores
        found = _Scores(found.scale * step.scale, (*found.factors, *step.factors), (*found.terms, *step.terms))
    return found


def _step(node: fx.Node, source: fx.Node) -> _Scores | None:
    """What one node does to the scores that it takes from `source`."""
    op = spelled(node)
    if op in ("cast", "clone"):
        return _Scores()
    if op == "where" and len(node.args) == 3:
        first, second, third = node.args
        condition, shown, other = (second, first, third) if node.op == "call_method" else (first, second, third)
        term = filled(condition, other if shown is source else shown, where=shown is not source)
        return None if term is None else _Scores(terms=(term,))
    if len(node.args) != (3 if op == "masked_fill" else 2) or node.kwargs:
        return None
    if op == "masked_fill":
        term = filled(node.args[1], node.args[2], where=True) if node.args[0] is source else None
    elif op == "add":
        mask = node.args[1] if node.args[0] is source else node.args[0]
        term = added(mask) if isinstance(mask, fx.Node) else None
    else:
        return _scaled(node, source) if op in ("mul", "div") else None
    return None if term is None else _Scores(terms=(term,))


def _scaled(node: fx.Node, source: fx.Node) -> _Scores | None:
    """scores * x, x * scores or scores / x."""
    divides = spelled(node) == "div"
    if divides and node.args[0] is not source:
        return None
    by: Any = node.args[1] if node.args[0] is source else node.args[0]
    if is_number(by):
        usable = math.isfinite(by) and by > 0
        return _Scores(scale=1 / by if divides else float(by)) if usable else None
    value = made(by)
    return _Scores(factors=((by, divides),)) if value is not None and value.dim() == 0 else None


def _dtypes_fit(found: _Written) -> bool:
    """Whether nothing is rounded to less than the scores are, but for float64 to float32, and the result is as the
    scores are, which masks can be made for."""
    first, last = made(found.inner[0]), made(found.result)
    assert first is not None and last is not None
    own = first.dtype
    between = {value.dtype for n in found.inner if (value := made(n)) is not None}
    precise = all(holds(d, own) or d == torch.float32 for d in between)
    return own == last.dtype and own.is_floating_point and precise and all(fits(t, own) for t in found.scores.terms)
