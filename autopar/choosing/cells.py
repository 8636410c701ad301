"""All cells of a space by their lower bound, as arrays: there may be half a million of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from autopar.choosing.bounds import GroupCosts, cell_bounds_s
from autopar.choosing.space import Group, Ints, Space
from autopar.predicting.sizes import Floats


@dataclass(frozen=True)
class Cell:
    """Layouts of one group on the same devices, none of which is faster than bound_s."""

    bound_s: float
    group: Group
    pp: int
    dp: int

    @property
    def devices(self) -> int:
        """How many devices its layouts take."""
        return self.group.tp * self.group.cp * self.pp * self.dp


@dataclass(frozen=True)
class Cells:
    """bounds_s: ascending; of equal ones, those with fewer degrees first. rows: [3, cells] group, pp, dp."""

    groups: tuple[Group, ...]
    bounds_s: Floats
    rows: Ints

    def __len__(self) -> int:
        return len(self.bounds_s)

    def __iter__(self) -> Iterator[Cell]:
        for bound_s, (at, pp, dp) in zip(self.bounds_s, self.rows.T, strict=True):
            yield Cell(float(bound_s), self.groups[at], int(pp), int(dp))

    @staticmethod
    def of(space: Space, possible: Callable[[Group], bool], costs_of: Callable[[Group], GroupCosts]) -> Cells:
        """All cells of the groups that are possible."""
        groups = tuple(filter(possible, space.groups()))
        bounds, rows = [np.zeros(0)], [np.zeros((3, 0), np.int64)]
        for at, group in enumerate(groups):
            pp, dp = space.cells(group)
            if len(pp):
                micro_batches = space.global_batch // (dp * group.micro_batch)
                schedule = space.pin.get("schedule")
                bounds.append(cell_bounds_s(costs_of(group), space.blocks, pp, micro_batches, schedule))
                rows.append(np.stack([np.full_like(pp, at), pp, dp]))
        bound_s, row = _floored(np.concatenate(bounds)), np.concatenate(rows, axis=1)
        degrees = np.array([(g.tp > 1) + (g.cp > 1) + (g.ep > 1) for g in groups], np.int64)
        plainness = (degrees[row[0]] if groups else np.zeros(0)) + (row[1] > 1)
        order = np.lexsort((row[2], plainness, bound_s))
        return Cells(groups, bound_s[order], row[:, order])


def _floored(seconds: Floats) -> Floats:
    """Without the last digits, in which processors differ: the order of cells must not."""
    mantissa, exponent = np.frexp(seconds)
    return np.ldexp(np.floor(mantissa * 2**40) / 2**40, exponent)
