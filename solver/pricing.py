"""Which groups of conversion columns are worth having in the model, by the duals of an LP.

The gain of a group is how much the LP's objective can at most fall, per unit, if the group
comes in: sum over its flows of max(0, pi) - cost - price of memory, where pi is the sum of
the duals of the flow's rows. This is the group's reduced cost, negated, with the duals of
its own (new) rows chosen best. It is never too small: where the exact value depends on
several columns of a group, the larger one is taken. So (column generation) an LP is
optimal once no missing group has a gain > 0, (bound) objective - sum of gains is a valid
bound before, and (fixing) no solution cheaper than objective + slack uses a missing group
whose gain is < -slack.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autopar.solver.formulation import Formulation
from autopar.solver.linear import Floats
from autopar.solver.rows import UseRows, ValueRows

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Prices:
    """Duals of rows, and `paid[t]`: cost of one byte from time 0 up to, not including, t."""

    duals: Floats
    paid: Floats
    cost_scale: float

    @staticmethod
    def of(form: Formulation, duals: Floats, cost_scale: float) -> Prices:
        at = np.zeros(form.model.times)
        for time, row in form.model.memory_rows.items():
            if row < len(duals):
                at[time] = max(0.0, -duals[row]) * form.model.byte_scale
        return Prices(duals, np.concatenate([[0.0], np.cumsum(at)]), cost_scale)

    def per_byte(self, span: tuple[int, int] | None) -> float:
        return 0.0 if span is None else float(self.paid[span[1] + 1] - self.paid[span[0]])


@dataclass(frozen=True)
class Found:
    """Missing groups with gain above the threshold, and the sum of all positive gains of missing groups."""

    own: list[tuple[int, int, int]]
    later: list[tuple[int, int, int]]
    total_gain: float

    def add_to(self, form: Formulation) -> int:
        for group in self.own:
            form.add_own(*group)
        for group in self.later:
            form.add_later(*group)
        return len(self.own) + len(self.later)


def price(form: Formulation, prices: Prices, threshold: float) -> Found:
    """All missing groups whose gain is > `threshold`."""
    own: list[tuple[int, int, int]] = []
    later: list[tuple[int, int, int]] = []
    total = 0.0
    for v, rows in form.owners():
        for gains, there, found in _gains(form, v, rows, prices):
            missing = np.where(there[rows.sources], -np.inf, gains)
            total += float(np.maximum(missing, 0.0).sum(axis=1).max(initial=0.0))
            for i, p in np.argwhere(missing > threshold):
                (own if found == "own" else later).append((v, rows.sources[i], int(p)))
    return Found(own, later, total)


def _gains(
    form: Formulation, v: int, rows: ValueRows, prices: Prices
) -> Iterator[tuple[Matrix, npt.NDArray[np.bool_], str]]:
    """[sources, states] gains of the groups of one value, per kind."""
    value = form.problem.values[v]
    seconds = value.convert_s[rows.sources]
    scale = prices.cost_scale * len(rows.lives)
    cost = np.where(np.isfinite(seconds), scale * np.nan_to_num(seconds, posinf=0.0), np.inf)
    size = np.asarray(value.state_bytes, dtype=np.float64)
    copied = np.broadcast_to(size, cost.shape)
    if value.convert_workspace_bytes is not None:
        copied = copied + value.convert_workspace_bytes[rows.sources]
    later = [_flow_gain(rows, use, prices, kept=True) for use in rows.later]
    if rows.own:
        gains = sum((_flow_gain(rows, use, prices) for use in rows.own), np.zeros_like(cost))
        gains = gains - cost - _held(rows.own, copied, _per_byte(prices, [life.own_copy for life in rows.lives]))
        if later:
            served = sum(later, np.zeros_like(cost))
            kept = size * _per_byte(prices, [life.kept_copy for life in rows.lives]) if form.memory else 0.0
            gains = gains + np.maximum(served - kept, 0.0)
        yield gains, rows.own_there, "own"
    if later:
        gains = sum((_flow_gain(rows, use, prices) for use in rows.later), np.zeros_like(cost))
        held = _held(rows.later, copied, _per_byte(prices, [life.later_copy for life in rows.lives]))
        yield gains - cost - held, rows.later_there, "later"


def _per_byte(prices: Prices, spans: Iterable[tuple[int, int] | None]) -> float:
    return sum(prices.per_byte(span) for span in spans)


def _held(uses: list[UseRows], size: Matrix, per_byte: float) -> Matrix:
    """[sources, states] price of the copy's memory; 0 if some use may not count it (an upper bound then)."""
    return size * per_byte if all(u.alias_bytes is None for u in uses) else np.zeros_like(size)


def _flow_gain(rows: ValueRows, use: UseRows, prices: Prices, *, kept: bool = False) -> Matrix:
    """[sources, states] max(0, sum of duals of the flow's rows); `kept`: as served by a kept copy."""
    source = prices.duals[use.made]
    if use.available is not None and not kept:
        source = source + prices.duals[use.available]
    target = np.where(use.wanted >= 0, prices.duals[use.wanted], -np.inf)
    if use.alias_bytes is not None:
        target = target - use.alias_bytes * _per_byte(prices, [(op, op) for op in use.ops(rows.lives)])
    return np.maximum(source[:, None] + target[None, :], 0.0)
