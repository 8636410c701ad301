"""What written-out attention does to its scores on the way to the softmax, as one mask for the op that replaces it.

A mask that is added is taken as it is. Where scores are filled with -inf or with a very low number, or such a number is
added where a condition holds, else 0, they get -inf. That is the same but for a query from which all keys are hidden:
its result is 0, as under sdpa, where a low number gives all keys equal weights and -inf gives no number. What is known
to hide all keys from some query is not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.tracing.known import known
from autopar.tracing.rewrites import holds
from autopar.tracing.spelling import is_number, made, spelled

_LOW_ENOUGH = -1e4  # exp of it, less any score, is 0 in every dtype: the highest number that models of float16 fill in


@dataclass(frozen=True)
class Term:
    """What is added to scores: a tensor; or, if `hides` is given, -inf where a condition is `hides`, else 0."""

    tensor: fx.Node
    hides: bool | None = None


def added(mask: fx.Node) -> Term | None:
    """The term of `scores + mask`; None where it can't be a mask of the op."""
    value = made(mask)
    if value is None or not value.is_floating_point() or value.requires_grad:
        return None
    if spelled(mask) == "where" and mask.op == "call_function" and len(mask.args) == 3:
        condition, *choices = mask.args
        for choice, other in (choices, choices[::-1]):
            if _number(other) == 0.0 and (term := filled(condition, choice, where=choice is choices[0])) is not None:
                return term
    return Term(mask)


def filled(condition: Any, fill: Any, *, where: bool) -> Term | None:
    """The term of scores that get a number where a condition is `where`."""
    shown, low = made(condition), _number(fill)
    if shown is None or shown.dtype != torch.bool or low is None or not low <= _LOW_ENOUGH:
        return None
    values = known(condition)
    hidden_whole = values is not None and bool((values == where).all(-1).any())
    return None if hidden_whole else Term(condition, where)


def _number(value: Any) -> float | None:
    if is_number(value):
        return float(value)
    tensor = known(value) if isinstance(value, fx.Node) else None
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def fits(term: Term, dtype: torch.dtype) -> bool:
    """Whether a term can be made in a dtype without loss."""
    value = made(term.tensor)
    return term.hides is not None or (value is not None and holds(dtype, value.dtype))


def mask_of(terms: Sequence[tuple[torch.Tensor, bool | None]], dtype: torch.dtype) -> torch.Tensor | None:
    """The sum of all terms. terms: tensor and `hides` of each, see `Term`."""
    total: torch.Tensor | None = None
    for tensor, hides in terms:
        part = tensor.to(dtype) if hides is None else _chosen(tensor.logical_not() if hides else tensor, dtype)
        total = part if total is None else total + part
    return total


def _chosen(shown: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    zero, lowest = (torch.full((), n, dtype=dtype, device=shown.device) for n in (0.0, -torch.inf))
    return torch.where(shown, zero, lowest)
