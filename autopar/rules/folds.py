"""Rules for dims that are several sequences in a row, or one that is dealt out (`autopar.placements.Fold`).

A model writes [batch, sequence, width] as [batch x sequence, width] before a product or a loss, and back. To cut the
sequence there is to cut each run of the long dim. What an op does along such a dim it mostly does to each row by
itself, or it sums over them: then a cut of each run is as good as a cut from end to end, for that is the same up to
the order of the rows. The views themselves turn one into the other. The same goes for rows that are dealt out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from autopar.placements import REPLICATE, Fold, Placement, dealt, is_dealt, own, shard, shard_dim, shard_runs
from autopar.rules.schema import OpCall
from autopar.rules.types import AxisRule

# Lowerings for which the order of rows means nothing. Not those that count places from where a rank's part starts.
_ANY_ORDER = frozenset({"local", "mean_partial", "shared_bias", "nll_loss", "nll_loss_backward"})
_MOVES = frozenset({"to_groups", "from_groups"})
_RESHAPES = frozenset({"aten.view", "aten._unsafe_view", "aten.reshape"})
# Ops that have rules for a dim along which they do look at the order.
_ORDERED = frozenset(
    {"aten.as_strided", "aten._grouped_mm", "aten.native_group_norm", "aten.native_group_norm_backward"}
    | {f"transformers.grouped_mm_fallback{kind}" for kind in ("", "_backward")}
)


def folded_rules(call: OpCall, rules: Iterable[AxisRule], fold: Fold) -> Iterator[AxisRule]:
    """The rules that cut runs, or deal them out, derived from those that cut dims from end to end."""
    if call.name in _RESHAPES:
        yield from _reshaped(call.inputs[0], call.out, fold)
        return
    if call.name in _ORDERED:
        return
    for rule in rules:
        moves = rule.lowering in _MOVES and own(0) in rule.inputs  # of a rank's own tokens, whichever these are
        if (rule.lowering in _ANY_ORDER or moves) and not rule.units:
            inputs = [_folded(t, p, fold) for t, p in zip(call.inputs, rule.inputs, strict=True)]
            outputs = [_folded(t, p, fold) for t, p in zip(call.outputs, rule.outputs, strict=True)]
            cut = [p for p in (*inputs, *outputs) if p is not None and p[0] in "SD"]
            if (
                cut
                and len({(p[0], shard_runs(p)) for p in cut}) == 1
                and _folds(cut[0])
                and not _counts_classes(call, inputs)
            ):
                taken = tuple(p for p in inputs if p is not None)
                yield AxisRule(taken, tuple(outputs), rule.lowering, rule.collectives)


def _folds(placement: Placement) -> bool:
    return shard_runs(placement) > 1 or is_dealt(placement)


def _counts_classes(call: OpCall, inputs: Sequence[Placement | None]) -> bool:
    """Whether the cut goes through the classes of a loss, which are counted, and not through its rows."""
    return call.name.startswith("aten.nll_loss") and all(inputs[i] == REPLICATE for i in call.slots["target"])


def _folded(tensor: torch.Tensor | None, placement: Placement | None, fold: Fold) -> Placement | None:
    dim = None if placement is None else shard_dim(placement)
    if tensor is None or placement is None or dim is None or placement[0] != "S":
        return placement
    size = tensor.shape[dim]
    if fold.dealt:
        whole = fold.holds(size)
        return dealt(dim, fold.runs if whole else 1) if whole or size == fold.run else placement
    return shard(dim, fold.runs) if fold.holds(size) else placement


def _reshaped(source: torch.Tensor, made: torch.Tensor, fold: Fold) -> Iterator[AxisRule]:
    before, after = _places(source.shape, fold), _places(made.shape, fold)
    for place in before.keys() & after.keys():
        yield AxisRule((before[place],), (after[place],))


def _places(shape: Sequence[int], fold: Fold) -> dict[tuple[int, int], Placement]:
    """Where a batch of sequences may be, or one: (how many elements go before it, its length) -> the placement that
    cuts the sequence."""
    cut = dealt if fold.dealt else shard
    found: dict[tuple[int, int], Placement] = {}
    sizes = list(map(int, shape))
    for dim, size in enumerate(sizes):
        before = math.prod(sizes[:dim])
        if fold.holds(size):
            found[before, fold.length] = cut(dim, fold.runs)
        elif size == fold.runs and dim + 1 < len(sizes) and sizes[dim + 1] == fold.run:
            found[before, fold.length] = cut(dim + 1)
        if fold.dealt and size == fold.run < fold.length:
            found[before, size] = cut(dim)
    return found
