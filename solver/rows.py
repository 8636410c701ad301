"""Rows and columns that `Formulation` has made, by what they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from autopar.solver.lifetimes import Use, ValueLife
from autopar.solver.linear import Floats, Ints

Sized = tuple[list[int], list[float]]  # columns, and the bytes that a unit of each holds
Terms = dict[int, list[int]]  # state -> columns whose sum says "in this state"


@dataclass
class UseRows:
    """Rows of one use: `made` per source state (aligned with ValueRows.sources), `wanted` per state (-1: never)."""

    use: Use
    made: Ints
    wanted: Ints
    available: Ints | None
    alias_bytes: Floats | None  # per wanted state, what the result takes at the use's own time if it was converted

    def ops(self, lives: list[ValueLife]) -> list[int]:
        """The op of this use for each of the values that share the rows."""
        first = lives[0]
        later = self.use in first.later_uses
        at = (first.later_uses if later else first.own_uses).index(self.use)
        return [(life.later_uses if later else life.own_uses)[at].op for life in lives]


@dataclass
class ValueRows:
    """What the model has of one value, and of all values that do the same in identical layers (`Op.twin_of`).

    owner: the first of them. lives: of all of them. `own_there`, `later_there`: [states, states], groups already in.
    """

    owner: int
    lives: list[ValueLife]
    sources: list[int]
    own: list[UseRows]
    later: list[UseRows]
    own_there: npt.NDArray[np.bool_]
    later_there: npt.NDArray[np.bool_]
    keep: dict[int, int]  # q -> KO
    away: dict[int, int]  # q -> A
    offloaded: int | None  # B
    kept_copies: dict[tuple[int, int], int] = field(default_factory=dict)  # (q, p) -> KC


@dataclass
class Held:
    """What some columns, one per choice, cost (seconds) and hold: per role, those that hold anything and how many
    bytes. ops: how many ops of identical layers share it."""

    columns: list[int]
    seconds: list[float]
    persistent: Sized
    workspace: Sized
    host: Sized
    results: list[Sized]
    ops: int = 0


def sized(columns: list[int], nbytes: list[int]) -> Sized:
    some = [(column, float(n)) for column, n in zip(columns, nbytes, strict=True) if n]
    return [column for column, _ in some], [n for _, n in some]


def terms(columns: list[int], states: list[int]) -> Terms:
    found: Terms = {}
    for column, state in zip(columns, states, strict=True):
        found.setdefault(state, []).append(column)
    return found
