"""Bytes that one rank sends in the collectives of a step, by kind and mesh axis.

All figures are those of bandwidth-optimal algorithms (rings and pairwise exchanges; Chan
et al. 2007, "Collective communication: theory, practice, and experience"): of n ranks that
each hold a block of b bytes, every rank sends (n - 1) * b to gather the blocks; from a
whole of w bytes it sends w * (n - 1) / n to scatter sums or to exchange blocks, and twice
that to sum everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from autopar.pricing import Price

Traffic = Counter[tuple[str, int]]  # (kind of collective, mesh axis) -> bytes


def sent_bytes(kind: str, whole_bytes: int, parts: int) -> Fraction:
    """What a rank sends in one collective over `parts` ranks. whole_bytes: of the larger of its tensors, before and
    after. In a "permute" each rank sends all that it has to one other."""
    if kind == "permute":
        return Fraction(whole_bytes)
    times = {"all_reduce": 2, "slice": 0}.get(kind, 1)
    return Fraction(times * whole_bytes * (parts - 1), parts)


def planned_traffic(priced: Price, mesh: Sequence[int], times: Mapping[str, int] | None = None) -> Traffic:
    """What a plan pays for: its conversions, and the collectives inside of ops.

    times: how often values are converted, by name, if more than once: a tied parameter, and its gradient, by every
    pipeline stage that uses it.
    """
    found: Traffic = Counter()
    steps = [(t.value, kind, axis, nbytes) for t in priced.transfers for kind, axis, nbytes, _ in t.steps]
    inner = [("", kind, axis, nbytes) for kind, axis, nbytes in priced.inner]
    for value, kind, axis, nbytes in (*steps, *inner):
        if kind != "slice":
            found[kind, axis] += (times or {}).get(value, 1) * sent_bytes(kind, nbytes, mesh[axis])  # type: ignore[assignment]
    return found
