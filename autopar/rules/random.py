"""Rules of ops that draw random numbers: whole, or in independent parts.

Whole (the replicated rule), every rank draws the same numbers as one device would. Cut,
each part is drawn from a generator of its own (`codegen.draws`), so only ops that draw
every element independently of the others can be cut.
"""

from __future__ import annotations

from typing import Any

from autopar.placements import shard
from autopar.rules.schema import OpCall, is_random
from autopar.rules.types import AxisRule

# Ops with a lowering that draws a part: `codegen.draws`.
IN_PARTS = frozenset(
    {
        "aten.native_dropout", "aten.bernoulli", "aten.uniform", "aten.normal_functional", "aten.exponential",
        "aten.rand", "aten.randn", "aten.randint", "aten.rand_like", "aten.randn_like", "aten.randint_like",
    }
)  # fmt: skip
_LARGEST_EXACT = 1 << 53  # bounds travel as double


def random_rules(call: OpCall) -> list[AxisRule]:
    """One rule per dim of the result: operands and results are cut alike. Empty for ops that are drawn whole only."""
    assert is_random(call)
    if call.name not in IN_PARTS or any(t.shape != call.out.shape for t in call.inputs):
        return []
    bounds = [call.arg(name) for name in ("low", "high") if call.arg(name) is not None]
    if call.arg("generator") is not None or any(not _is_exact(bound) for bound in bounds):
        return []
    cuts = [shard(d) for d in range(call.out.dim())]
    return [AxisRule((c,) * len(call.inputs), (c,) * len(call.outputs), "draw") for c in cuts]


def _is_exact(bound: Any) -> bool:
    return isinstance(bound, int) and abs(bound) <= _LARGEST_EXACT
