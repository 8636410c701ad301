"""Whether a model's sequences are dealt out to the ranks that share them ("D" in `autopar.placements`).

Under a causal mask a later token has more keys to look at: a rank that holds the last part of a sequence works most.
Where each rank has a chunk from either end, all have the same work. What ops do along a sequence is mostly the same
for any order of its rows (`autopar.rules.folds`), so a sequence is dealt out once, where it is first cut, and stays
so; what comes of it is put in order only where somebody wants it whole, or as it was.

Attention that looks back a fixed way is as much work for all ranks as they are, and its keys have a shorter way between
neighbours. Random numbers are those of places in the whole. Models with either are not dealt out.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.dataflow import Dataflow
from autopar.placements import Fold
from autopar.rules import is_random
from autopar.rules.ring import can_be_dealt, window_of
from autopar.rules.schema import op_call
from autopar.trace import Trace


def fold_of(trace: Trace) -> Fold | None:
    """The trace's fold as a search is to see it that cuts sequences."""
    fold = trace.fold
    if fold is None:
        return None
    if _is_to_be_dealt(trace, fold):
        return replace(fold, dealt=True)
    return fold if fold.runs > 1 else None


def _is_to_be_dealt(trace: Trace, fold: Fold) -> bool:
    found = False
    for node in Dataflow.of(trace).ops:
        if not hasattr(node.target, "_schema"):
            continue
        call = op_call(node)
        if is_random(call) or window_of(call):
            return False
        found = found or can_be_dealt(call, fold.run)
    return found
