"""What one value costs, given who makes and uses it in which state, at prices of memory: a factor of `ascent`.

A factor stands for a value and all that do the same in identical layers. Its variables are
the op that makes the value (in state q, running again or not) and the ops that use it. A use
is of one of three kinds:

    OWN     in the pass that makes the value: wants state p
    BOTH    the same, by an op that may run again: wants p, and p once more if it does
    LATER   in the backward pass, of a value of the forward pass: wants p

The cost for given states is that of `solver.evaluate`: uses are split into blocks that share
a state p. A block pays the conversion from q once per pass; what it needs in the backward
pass comes from a kept copy, or from the original, which is there if it is always, was kept,
or is made again (not for a LATER use that comes before that, an *early* one). Least cost over
all states is found by dynamic programming over subsets of uses, exactly. Left out, so that
the factor is a little cheaper than the truth but never dearer: early uses by ops that run
again, memory that only uses with aliased results hold, and (see `MOST_USES`) sharing among
very many uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from autopar.solver.lifetimes import Kinds, Span, ValueLife, value_kinds
from autopar.solver.linear import Floats, Ints
from autopar.solver.problem import Problem, Value

IMPOSSIBLE = 1e11  # model units, where all costs together are around 1e3: stands for infinity, and stays a number
MOST_USES = 6  # of one factor; a value with more has several, each with an equal part of the costs
OWN, BOTH, LATER = 0, 1, 2


@dataclass(frozen=True)
class FactorUse:
    """op: whose slot takes the value. kind: OWN, BOTH or LATER. alias: see `solver.lifetimes.Use`."""

    op: int
    slot: int
    kind: int
    early: bool
    alias: bool


@dataclass(frozen=True)
class Subsets:
    """All subsets of n uses as bit masks; `member`: [2^n, n]. rounds: per size of a set, the ways to split off the
    block of its first use: (sets, starts, blocks, rests), the ways of one set standing together."""

    member: Floats
    rounds: tuple[tuple[Ints, Ints, Ints, Ints], ...]
    containing: tuple[Ints, ...]


@cache
def subsets(n: int) -> Subsets:
    masks = np.arange(1 << n)
    member = ((masks[:, None] >> np.arange(n)) & 1).astype(np.float64)
    size = member.sum(axis=1).astype(int)
    rounds = []
    for k in range(1, n + 1):
        sets: list[int] = []
        starts: list[int] = []
        blocks: list[int] = []
        rests: list[int] = []
        for mask in masks[size == k]:
            first = int(mask) & -int(mask)
            sets.append(int(mask))
            starts.append(len(blocks))
            for block in range(1, int(mask) + 1):
                if block & first and not block & ~int(mask):
                    blocks.append(block)
                    rests.append(int(mask) ^ block)
        rounds.append(tuple(np.array(a, dtype=np.int64) for a in (sets, starts, blocks, rests)))
    containing = tuple(masks[(masks >> i) & 1 == 1] for i in range(n))
    return Subsets(member, tuple(rounds), containing)  # type: ignore[arg-type]


class Factor:
    """One value, its variables and the messages they sent. Position -1 is the maker, 0.. are the uses.

    Domains: of the maker state q, or q + states * (runs again) if it may; of a use state p, or for BOTH
    p + states * (runs again).
    """

    def __init__(
        self, life: ValueLife, uses: Sequence[FactorUse], costs: _Costing, root: Ints, maker_may_rerun: bool
    ) -> None:
        self.life, self._costs = life, costs
        self.made_by, self.result, self.uses = life.made_by, life.result, tuple(uses)
        self.states = len(costs.size)
        self.maker_may_rerun = maker_may_rerun
        ops = [int(root[life.made_by]), *(int(root[u.op]) for u in uses)]
        self.ends = (min(ops), max(ops))
        self._sets = subsets(len(uses))
        self.possible: list[npt.NDArray[np.bool_]] = []  # per variable, which values some label has
        self._tables: list[_Table] = []
        self._known: list[Floats] | None = None
        self._messages: list[Floats] = []

    def domain(self, position: int) -> int:
        """How many values a variable of the factor may take."""
        twice = self.maker_may_rerun if position < 0 else self.uses[position].kind == BOTH
        return self.states * (2 if twice else 1)

    def maker_index(self, made: Ints, again: npt.NDArray[np.bool_]) -> Ints:
        return made + self.states * again if self.maker_may_rerun else made

    def use_index(self, position: int, wanted: Ints, again: npt.NDArray[np.bool_]) -> Ints:
        return wanted + self.states * again if self.uses[position].kind == BOTH else wanted

    def set_prices(self, cost_scale: float, paid: Floats) -> None:
        """What is to be paid from now on (see `DualAscent.run`); messages start at nothing again."""
        costs = self._costs.at(cost_scale, paid)
        self._tables = _tables(self.life, self.uses, costs, self._sets, self.maker_may_rerun)
        self._messages = [np.where(p, 0.0, IMPOSSIBLE) for p in self.possible]
        self._known = None

    def message(self, position: int) -> Floats:
        return self._messages[position + 1]

    def send(self, position: int, message: Floats) -> None:
        self._messages[position + 1] = np.minimum(message, IMPOSSIBLE)
        if position >= 0:
            self._known = None

    # -- minima ------------------------------------------------------------------

    def least(self) -> float:
        """The minimum over everything, messages counted."""
        return float((self._by_maker() + self.message(-1)).min())

    def marginal(self, position: int) -> Floats:
        """[domain] the minimum over all others, their messages counted and its own not."""
        return self._by_maker() if position < 0 else self._by_use(position)

    def _by_maker(self) -> Floats:
        found = [table.extra + least[-1] for table, least in zip(self._tables, self._partitions(), strict=True)]
        return (found[0] if len(found) == 1 else np.min(found, axis=0)).ravel()

    def _partitions(self) -> list[Floats]:
        """Per table, [sets, q] the least cost of every set of uses, split into blocks; kept until a use sends."""
        if self._known is None:
            plain, later = self._sums(None)
            self._known = [self._partition(table, plain, later) for table in self._tables]
        return self._known

    def _sums(self, without: int | None) -> tuple[Floats, Floats]:
        """[sets, states] messages of the members of every set: if nothing is wanted later, and if something is.

        For the first, sets with a LATER member do not count. without: a use whose own message is left out.
        """
        n = self.states
        plain, later = np.zeros((len(self.uses), n)), np.zeros((len(self.uses), n))
        for i, use in enumerate(self.uses):
            sent = self._messages[i + 1]
            if i == without:
                continue
            if use.kind == BOTH:
                plain[i], later[i] = sent[:n], np.minimum(sent[:n], sent[n:])
            else:
                plain[i] = later[i] = sent
        if len(self.uses) == 1:  # by far the most
            return plain, later
        return self._sets.member @ plain, self._sets.member @ later

    def _partition(self, table: _Table, plain: Floats, later: Floats) -> Floats:
        if len(self.uses) == 1:
            return self._only_block(table, plain[0], later[0])[None]
        block = np.full((len(plain), self.states), IMPOSSIBLE)
        if len(table.plain_sets):
            block[table.plain_sets] = (plain[table.plain_sets][:, None, :] + table.plain).min(axis=2)
        if len(table.later_sets):
            wanted = (later[table.later_sets][:, None, :] + table.later).min(axis=2)
            block[table.later_sets] = np.minimum(block[table.later_sets], wanted)
        least = np.zeros_like(block)
        for sets, starts, blocks, rests in self._sets.rounds:
            least[sets] = np.minimum.reduceat(block[blocks] + least[rests], starts, axis=0)
        return least

    def _only_block(self, table: _Table, plain: Floats, later: Floats) -> Floats:
        """[q] where there is one use."""
        if not len(table.later_sets):
            return (table.plain[0] + plain).min(axis=1)
        wanted = (table.later[0] + later).min(axis=1)
        return np.minimum(wanted, (table.plain[0] + plain).min(axis=1)) if len(table.plain_sets) else wanted

    def _made(self, table: _Table) -> Floats:
        """[states] the maker's message and what the table costs, the better of running again and not."""
        return (self.message(-1).reshape(table.extra.shape) + table.extra).min(axis=0)

    def _by_use(self, position: int) -> Floats:
        n, use = self.states, self.uses[position]
        plain, later = self._sums(position)
        found = np.full((2, n), IMPOSSIBLE)
        one = len(self.uses) == 1
        for t, table in enumerate(self._tables):
            made = self._made(table)
            for row, costs, sets, (some, rests), sent in (
                (0, table.plain, table.plain_sets, table.plain_with[position], plain),
                (1, table.later, table.later_sets, table.later_with[position], later),
            ):
                if one and len(sets):
                    found[row] = np.minimum(found[row], (costs[0] + made[:, None]).min(axis=0))
                elif len(some):
                    others = self._partitions()[t][rests] + made
                    best = (costs[some] + others[:, :, None]).min(axis=1) + sent[sets[some]]
                    found[row] = np.minimum(found[row], best.min(axis=0))
        if use.kind == BOTH:
            return np.concatenate([np.minimum(found[0], found[1]), found[1]])
        return found.min(axis=0) if use.kind == OWN else found[1]


@dataclass(frozen=True)
class _Costs:
    """[states, states] from q to p, model units: a conversion; the memory of its result in the own pass, in the
    backward pass. [states]: a kept copy, an original that is kept or offloaded. Diagonals are 0."""

    convert: Floats
    own_copy: Floats
    later_copy: Floats
    kept_copy: Floats
    kept: Floats


@dataclass(frozen=True)
class _Table:
    """What blocks cost, given how the original is there in the backward pass: not, or made again or kept (or always).

    plain, later: [sets, q, p] if nothing, something is wanted later; only of the sets (their bit masks) where that is
    possible: `plain_sets` have no LATER member, `later_sets` not only OWN ones. extra: [1, q], or [2, q] of a maker
    that does not, does run again. plain_with, later_with: per use, the rows with it, and all uses but the row's.
    """

    plain: Floats
    later: Floats
    plain_sets: Ints
    later_sets: Ints
    extra: Floats
    plain_with: list[tuple[Ints, Ints]]
    later_with: list[tuple[Ints, Ints]]


def _tables(
    life: ValueLife, uses: tuple[FactorUse, ...], costs: _Costs, sets: Subsets, may_rerun: bool
) -> list[_Table]:
    kinds = np.array([u.kind for u in uses])
    has_own = (sets.member @ (kinds != LATER).astype(float)) > 0
    early = (sets.member @ np.array([float(u.early and u.kind == LATER) for u in uses])) > 0
    own = _copies(sets, costs.convert, costs.own_copy, [u.kind != LATER for u in uses], uses)
    nothing = np.zeros((2 if may_rerun else 1, len(costs.kept)))
    if not bool((kinds != OWN).any()):
        return [_table(own, own, nothing, sets, kinds)]
    later = _copies(sets, costs.convert, costs.later_copy, [u.kind != OWN for u in uses], uses)
    copied = costs.kept_copy[None, :] + np.where(np.eye(len(costs.kept), dtype=bool), IMPOSSIBLE, 0.0)
    copied = np.where(has_own[:, None, None], copied, IMPOSSIBLE)
    there = own + np.minimum(copied, later)
    if not life.needs_keeping:
        return [_table(own, there, nothing, sets, kinds)]
    gone = _table(own, own + copied, nothing, sets, kinds)
    kept = nothing + costs.kept  # or offloaded, where that costs less
    if not may_rerun:
        return [gone, _table(own, there, kept, sets, kinds)]
    if not early.any():
        kept[1] = np.minimum(kept[1], 0.0)  # made again instead
        return [gone, _table(own, there, kept, sets, kinds)]
    again = own + np.where(early[:, None, None], copied, np.minimum(copied, later))
    rerun = nothing.copy()
    rerun[0] = IMPOSSIBLE
    return [gone, _table(own, there, kept, sets, kinds), _table(own, again, rerun, sets, kinds)]


def _table(plain: Floats, later: Floats, extra: Floats, sets: Subsets, kinds: Ints) -> _Table:
    size = sets.member.sum(axis=1)
    plain_sets = np.nonzero((size > 0) & (sets.member @ (kinds == LATER) == 0))[0]
    later_sets = np.nonzero(sets.member @ (kinds != OWN) > 0)[0]
    members = [_with(some, sets) for some in (plain_sets, later_sets)]
    return _Table(plain[plain_sets], later[later_sets], plain_sets, later_sets, extra, *members)


def _with(some: Ints, sets: Subsets) -> list[tuple[Ints, Ints]]:
    """Per use, which of these sets it is in, and all uses that are not in them."""
    everything = len(sets.member) - 1
    found = []
    for use in range(sets.member.shape[1]):
        rows = np.nonzero((some >> use) & 1)[0]
        found.append((rows, everything ^ some[rows]))
    return found


def _copies(sets: Subsets, convert: Floats, held: Floats, concerned: list[bool], uses: tuple[FactorUse, ...]) -> Floats:
    """[sets, q, p] what a block pays for its copy in one pass: nothing if no member is concerned, and no memory if
    all that are take the copy as their result."""
    any_use = (sets.member @ np.array(concerned, dtype=float)) > 0
    counted = [c and not u.alias for c, u in zip(concerned, uses, strict=True)]
    any_counted = (sets.member @ np.array(counted, dtype=float)) > 0
    return np.where(any_use[:, None, None], convert, 0.0) + np.where(any_counted[:, None, None], held, 0.0)


def factors_of(problem: Problem, lives: tuple[ValueLife, ...], root: Ints, kinds: Kinds | None = None) -> list[Factor]:
    """The factors of a problem, without prices so far. kinds: if known, see `lifetimes.value_kinds`."""
    found: list[Factor] = []
    for members in value_kinds(problem, lives) if kinds is None else kinds:
        life = lives[members[0]]
        uses = _uses(life, problem)
        groups = [uses[i : i + MOST_USES] for i in range(0, len(uses), MOST_USES)]
        again = problem.ops[life.made_by].recompute_time is not None
        if groups:
            costs = _Costing.of(problem.values[members[0]], [lives[v] for v in members], 1.0 / len(groups))
            found.extend(Factor(life, group, costs, root, again) for group in groups)
    return found


def _uses(life: ValueLife, problem: Problem) -> list[FactorUse]:
    """The uses of a value, one for all those that take it in the same slot of twins: in the same state, that is."""

    def first(o: int) -> int:
        twin = problem.ops[o].twin_of
        return o if twin is None else twin

    rerun = {(u.op, u.slot) for u in life.later_uses if u.rerun}
    found: dict[tuple[int, int, int], FactorUse] = {}
    for u in life.own_uses:
        kind = BOTH if (u.op, u.slot) in rerun else OWN
        found.setdefault((first(u.op), u.slot, kind), FactorUse(u.op, u.slot, kind, False, u.alias))
    for u in life.later_uses:
        if not u.rerun:
            key = (first(u.op), u.slot, LATER)
            known = found.get(key)
            early = u.early and (known is None or known.early)
            found[key] = FactorUse(u.op, u.slot, LATER, early, u.alias)
    return list(found.values())


@dataclass(frozen=True)
class _Costing:
    """What the costs of a factor follow from. seconds, copied: [q, p] of all conversions together, and bytes of one
    copy; size: [states]. part: of all costs, see MOST_USES. spans: first and last times of all copies of a kind.
    offload: [states] seconds of all of them to the host and back."""

    seconds: Floats
    blocked: npt.NDArray[np.bool_]
    offload: Floats
    value: Value
    copied: Floats
    size: Floats
    part: float
    spans: dict[str, tuple[Ints, Ints]]

    @staticmethod
    def of(value: Value, lives: list[ValueLife], part: float) -> _Costing:
        size = np.asarray(value.state_bytes, dtype=np.float64)
        blocked = ~np.isfinite(value.convert_s)
        seconds = np.where(blocked, 0.0, value.convert_s) * len(lives)
        copied = np.broadcast_to(size, seconds.shape)
        if value.convert_workspace_bytes is not None:
            copied = copied + value.convert_workspace_bytes
        spans: dict[str, list[Span | None]] = {
            "own": [life.own_copy for life in lives],
            "later": [life.later_copy for life in lives],
            "kept_copy": [life.kept_copy for life in lives],
            "kept": [life.kept for life in lives],
            "fetched": [life.fetched for life in lives],
        }
        away = value.offload_s is not None and any(life.needs_keeping for life in lives)
        offload = np.array(value.offload_s) * len(lives) if away else np.full(len(size), np.inf)
        ends = {k: _ends(some) for k, some in spans.items()}
        return _Costing(seconds, blocked, offload, value, copied, size, part, ends)

    def at(self, cost_scale: float, paid: Floats) -> _Costs:
        price = {k: float((paid[last + 1] - paid[first]).sum()) for k, (first, last) in self.spans.items()}
        kept = self.part * self.size * price["kept"]
        kept_copy = self.part * self.size * price["kept_copy"]
        kept_copy[list(self.value.fleeting)] = IMPOSSIBLE
        if not self.value.may_keep:
            kept, kept_copy = np.full_like(kept, IMPOSSIBLE), np.full_like(kept, IMPOSSIBLE)
        there = np.isfinite(self.offload)
        away = self.part * (cost_scale * np.where(there, self.offload, 0.0) + self.size * price["fetched"])
        return _Costs(
            np.where(self.blocked, IMPOSSIBLE, self.part * cost_scale * self.seconds),
            self._between(self.copied * price["own"]),
            self._between(self.copied * price["later"]),
            kept_copy,
            np.minimum(kept, np.where(there, away, IMPOSSIBLE)),
        )

    def _between(self, costs: Floats) -> Floats:
        costs = self.part * costs
        np.fill_diagonal(costs, 0.0)
        return costs


def _ends(spans: list[Span | None]) -> tuple[Ints, Ints]:
    there = [span for span in spans if span is not None]
    return np.array([s[0] for s in there], dtype=np.int64), np.array([s[1] for s in there], dtype=np.int64)
