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

from autopar.solver.lifetimes import Span, ValueLife, value_kinds
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
        self._levels: list[_Level] = []
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
        self._levels = _levels(self.life, self.uses, costs, self._sets, self.maker_may_rerun)
        self._messages = [np.where(p, 0.0, IMPOSSIBLE) for p in self.possible]

    def message(self, position: int) -> Floats:
        return self._messages[position + 1]

    def send(self, position: int, message: Floats) -> None:
        self._messages[position + 1] = np.minimum(message, IMPOSSIBLE)

    # -- minima ------------------------------------------------------------------

    def least(self) -> float:
        """The minimum over everything, messages counted."""
        return float((self._by_maker() + self.message(-1)).min())

    def marginal(self, position: int) -> Floats:
        """[domain] the minimum over all others, their messages counted and its own not."""
        return self._by_maker() if position < 0 else self._by_use(position)

    def _by_maker(self) -> Floats:
        n = self.states
        plain, again = self._sums(self._sets.member, None)
        found = np.full(n * (2 if self.maker_may_rerun else 1), IMPOSSIBLE)
        for level in self._levels:
            rest = self._partition(level, plain, again)[-1] + level.extra
            if level.needs_rerun:
                found[n:] = np.minimum(found[n:], rest)
            elif self.maker_may_rerun:
                found = np.minimum(found, np.tile(rest, 2))
            else:
                found = np.minimum(found, rest)
        return found

    def _sums(self, member: Floats, without: int | None) -> tuple[Floats, Floats]:
        """[sets, states] messages of the members of every set: if nothing is wanted later, and if something is.

        A LATER member makes the first impossible. without: a use whose own message is left out.
        """
        n = self.states
        plain, later = np.zeros((len(self.uses), n)), np.zeros((len(self.uses), n))
        for i, use in enumerate(self.uses):
            sent = self._messages[i + 1]
            if use.kind == LATER:
                plain[i] = IMPOSSIBLE
            if i == without:
                continue
            if use.kind == OWN:
                plain[i] = later[i] = sent
            elif use.kind == LATER:
                later[i] = sent
            else:
                plain[i], later[i] = sent[:n], np.minimum(sent[:n], sent[n:])
        return member @ plain, member @ later

    def _blocks(self, level: _Level, plain: Floats, later: Floats, sets: Ints | slice = slice(None)) -> Floats:
        """[sets, q, p] the cost of a block, members' messages counted."""
        return np.minimum(plain[sets][:, None, :] + level.plain[sets], later[sets][:, None, :] + level.later[sets])

    def _partition(self, level: _Level, plain: Floats, later: Floats) -> Floats:
        """[sets, q] the least cost of a set of uses, split into blocks."""
        if len(self.uses) == 1:  # by far the most
            block = np.minimum(plain[1] + level.plain[1], later[1] + level.later[1])
            return block.min(axis=1)[None]
        block = self._blocks(level, plain, later).min(axis=2)
        least = np.zeros_like(block)
        for sets, starts, blocks, rests in self._sets.rounds:
            least[sets] = np.minimum.reduceat(block[blocks] + least[rests], starts, axis=0)
        return least

    def _made(self, level: _Level) -> Floats:
        """[states] the maker's message, whether or not it runs again if the level leaves that open."""
        sent, n = self.message(-1), self.states
        if level.needs_rerun:
            return sent[n:]
        return np.minimum(sent[:n], sent[n:]) if self.maker_may_rerun else sent

    def _by_only_use(self) -> Floats:
        """`_by_use` where there is one."""
        use, n = self.uses[0], self.states
        found = np.full((2, n), IMPOSSIBLE)
        for level in self._levels:
            made = (level.extra + self._made(level))[:, None]
            if use.kind != OWN:
                found[1] = np.minimum(found[1], (level.later[1] + made).min(axis=0))
            if use.kind != LATER:
                found[0] = np.minimum(found[0], (level.plain[1] + made).min(axis=0))
        if use.kind == BOTH:
            return found.ravel()
        return found[0] if use.kind == OWN else found[1]

    def _by_use(self, position: int) -> Floats:
        if len(self.uses) == 1:
            return self._by_only_use()
        n, use = self.states, self.uses[position]
        with_it = self._sets.containing[position]
        plain, later = self._sums(self._sets.member, None)
        plain_without, later_without = self._sums(self._sets.member, position)
        rests = (len(self._sets.member) - 1) ^ with_it
        found = np.full((2, n), IMPOSSIBLE)
        for level in self._levels:
            made = self._made(level)
            others = (self._partition(level, plain, later)[rests] + (level.extra + made))[:, :, None]
            with_later = later_without[with_it][:, None, :] + level.later[with_it] + others
            found[1] = np.minimum(found[1], with_later.min(axis=(0, 1)))
            if use.kind != LATER:
                without = plain_without[with_it][:, None, :] + level.plain[with_it] + others
                found[0] = np.minimum(found[0], without.min(axis=(0, 1)))
        if use.kind == BOTH:
            return np.concatenate([np.minimum(found[0], found[1]), found[1]])
        return found.min(axis=0) if use.kind == OWN else found[1]


@dataclass(frozen=True)
class _Costs:
    """[states, states] from q to p, model units: a conversion; the memory of its result in the own pass, in the
    backward pass. [states]: a kept copy, a kept original. Diagonals are 0."""

    convert: Floats
    own_copy: Floats
    later_copy: Floats
    kept_copy: Floats
    kept: Floats


@dataclass(frozen=True)
class _Level:
    """How the original is there in the backward pass: not, made again, or kept (or always).

    plain, later: [sets, q, p] what a block costs if nothing, something is wanted later. extra: [q] for the level.
    """

    plain: Floats
    later: Floats
    extra: Floats
    needs_rerun: bool


def _levels(
    life: ValueLife, uses: tuple[FactorUse, ...], costs: _Costs, sets: Subsets, may_rerun: bool
) -> list[_Level]:
    n = len(costs.kept)
    kinds = np.array([u.kind for u in uses])
    has_own = (sets.member @ (kinds != LATER).astype(float)) > 0
    early = (sets.member @ np.array([float(u.early and u.kind == LATER) for u in uses])) > 0
    own = _copies(sets, costs.convert, costs.own_copy, [u.kind != LATER for u in uses], uses)
    later = _copies(sets, costs.convert, costs.later_copy, [u.kind != OWN for u in uses], uses)
    copied = costs.kept_copy[None, :] + np.where(np.eye(n, dtype=bool), IMPOSSIBLE, 0.0)
    copied = np.where(has_own[:, None, None], copied, IMPOSSIBLE)
    nothing = np.zeros(n)
    wanted_later = bool((kinds != OWN).any())
    if not wanted_later:
        return [_Level(own, np.full_like(own, IMPOSSIBLE), nothing, False)]
    there = own + np.minimum(copied, later)
    if not life.needs_keeping:
        return [_Level(own, there, nothing, False)]
    found = [_Level(own, own + copied, nothing, False), _Level(own, there, costs.kept, False)]
    if may_rerun:
        again = own + np.where(early[:, None, None], copied, np.minimum(copied, later))
        found.append(_Level(own, again, nothing, True))
    return found


def _copies(sets: Subsets, convert: Floats, held: Floats, concerned: list[bool], uses: tuple[FactorUse, ...]) -> Floats:
    """[sets, q, p] what a block pays for its copy in one pass: nothing if no member is concerned, and no memory if
    all that are take the copy as their result."""
    any_use = (sets.member @ np.array(concerned, dtype=float)) > 0
    counted = [c and not u.alias for c, u in zip(concerned, uses, strict=True)]
    any_counted = (sets.member @ np.array(counted, dtype=float)) > 0
    return np.where(any_use[:, None, None], convert, 0.0) + np.where(any_counted[:, None, None], held, 0.0)


def factors_of(problem: Problem, lives: tuple[ValueLife, ...], root: Ints) -> list[Factor]:
    """The factors of a problem, without prices so far."""
    found: list[Factor] = []
    for members in value_kinds(problem, lives).values():
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
    copy; size: [states]. part: of all costs, see MOST_USES. spans: first and last times of all copies of a kind."""

    seconds: Floats
    blocked: npt.NDArray[np.bool_]
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
        }
        return _Costing(seconds, blocked, copied, size, part, {k: _ends(some) for k, some in spans.items()})

    def at(self, cost_scale: float, paid: Floats) -> _Costs:
        price = {k: float((paid[last + 1] - paid[first]).sum()) for k, (first, last) in self.spans.items()}
        return _Costs(
            np.where(self.blocked, IMPOSSIBLE, self.part * cost_scale * self.seconds),
            self._between(self.copied * price["own"]),
            self._between(self.copied * price["later"]),
            self.part * self.size * price["kept_copy"],
            self.part * self.size * price["kept"],
        )

    def _between(self, costs: Floats) -> Floats:
        costs = self.part * costs
        np.fill_diagonal(costs, 0.0)
        return costs


def _ends(spans: list[Span | None]) -> tuple[Ints, Ints]:
    there = [span for span in spans if span is not None]
    return np.array([s[0] for s in there], dtype=np.int64), np.array([s[1] for s in there], dtype=np.int64)
