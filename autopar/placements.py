"""The vocabulary of placements.

A *placement* says how one tensor lies on one mesh axis, as a short string that is
also what users write in pins and what plan files hold:

    "R"      every rank of the axis holds the whole tensor
    "S(d)"   dim d is cut into equal parts, one a rank, in rank order
    "S(d/k)" dim d is k runs one after the other (the sequences of a batch, written in a row: see `Fold`); each run is
             cut into equal parts
    "D(d)"   dim d is cut into twice as many equal chunks as there are ranks; rank i has the i-th and the i-th from the
             end, in this order: it is dealt out, so that all ranks have as much to do under a causal mask. "D(d/k)":
             each of the k runs of dim d is
    "P"      every rank holds a summand; the tensor is their sum

Rows in groups (those that experts work on, `autopar.grouping`) can also be cut by what they are, in parts of
sizes that only the run knows. Nothing is converted to or from these; the moves to groups and back make and take them.

    "L(d)"   a rank has the rows of the tokens that it holds, and they stand in their groups' order among themselves
    "E(d)"   a rank has the rows of its share of the groups, one share a rank, in rank order

A *state* is a tuple with one placement per mesh axis. Where two axes cut the same
dim, the earlier axis cuts first (it is the outer one), the later one cuts what that leaves on a rank. Shards are
always even: a dim that does not divide is not cut.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

Placement = str
State = tuple[Placement, ...]

REPLICATE: Placement = "R"
PARTIAL: Placement = "P"

_SHARD = re.compile(r"[SDLE]\((\d+)(?:/([1-9]\d*))?\)\Z")


@dataclass(frozen=True)
class Fold:
    """That dims of `length` are `runs` sequences in a row: what a model makes of [batch, sequence] before a product.

    dealt: whether a sequence that is cut is dealt out ("D"), here and where it is a dim by itself. pairs: the length of
    dims that have several rows for each token, one for each expert that it goes to; 0 where there are none.
    """

    length: int
    runs: int
    dealt: bool = False
    pairs: int = 0

    @property
    def run(self) -> int:
        """The length of one sequence."""
        return self.length // self.runs

    def holds(self, size: int) -> bool:
        """Whether dims of this size are sequences in a row."""
        return size in (self.length, self.pairs)


@cache
def shard(dim: int, runs: int = 1) -> Placement:
    """The placement that cuts dim `dim` (not negative), or each of the runs that it is made of."""
    if dim < 0:
        raise ValueError(f"a shard dim counts from the front, got {dim}")
    return f"S({dim})" if runs == 1 else f"S({dim}/{runs})"


@cache
def dealt(dim: int, runs: int = 1) -> Placement:
    """The placement that deals out dim `dim`, or each of the runs that it is made of."""
    return "D" + shard(dim, runs)[1:]


def is_dealt(placement: Placement) -> bool:
    """Whether a placement deals out what it cuts."""
    return placement[0] == "D"


@cache
def cut_alike(one: Placement, other: Placement) -> bool:
    """Whether of two placements on two axes one cuts inside of what the other has cut, so that their order matters."""
    if one[0] not in "SD" or other[0] not in "SD":
        return one == other and one not in (REPLICATE, PARTIAL)
    return shard_dim(one) == shard_dim(other) and shard_runs(one) == shard_runs(other)


@cache
def own(dim: int) -> Placement:
    """Rows along dim `dim` of the tokens that a rank holds."""
    return f"L({dim})"


@cache
def experts(dim: int) -> Placement:
    """Rows along dim `dim` of the groups that a rank holds."""
    return f"E({dim})"


def in_groups(placement: Placement) -> bool:
    """Whether a placement cuts rows by what they are."""
    return placement[0] in "LE"


@cache
def shard_dim(placement: Placement) -> int | None:
    """The dim a placement cuts, or None for "R" and "P"."""
    match = _SHARD.match(placement)
    return int(match.group(1)) if match else None


@cache
def shard_runs(placement: Placement) -> int:
    """Into how many runs a placement takes the dim that it cuts: 1 but for "S(d/k)" and "D(d/k)"."""
    match = _SHARD.match(placement)
    return int(match.group(2) or 1) if match else 1


def runs_left(placement: Placement, state: State, mesh: Sequence[int]) -> int:
    """Of the runs of a placement "S(d/k)", those that are left to a rank where other axes cut d from end to end.

    1 of any other placement.
    """
    left, dim = shard_runs(placement), shard_dim(placement)
    if left == 1:
        return 1
    for other, size in zip(state, mesh, strict=True):
        if shard_dim(other) == dim and shard_runs(other) == 1:
            left //= size
    return left


def is_placement(text: str) -> bool:
    """Whether `text` is one of "R", "P", "S(d)", "S(d/k)", "D(d)", "D(d/k)", "L(d)", "E(d)"."""
    return text in (REPLICATE, PARTIAL) or shard_dim(text) is not None


def replicated(axes: int) -> State:
    """The state that is whole everywhere, for a mesh of `axes` axes."""
    return (REPLICATE,) * axes


def shard_counts(rank: int, state: State, mesh: Sequence[int]) -> list[int]:
    """Into how many parts each of `rank` dims is cut by `state` on `mesh`."""
    counts = [1] * rank
    for placement, size in zip(state, mesh, strict=True):
        dim = shard_dim(placement)
        if dim is not None:
            counts[dim] *= size
    return counts


def local_shape(shape: Sequence[int], state: State, mesh: Sequence[int]) -> tuple[int, ...] | None:
    """The shape a rank holds, or None where a dim does not exist or does not divide evenly."""
    local = list(shape)
    folded = False
    for placement, size in zip(state, mesh, strict=True):
        dim = shard_dim(placement)
        if dim is None:
            continue
        if dim >= len(local) or local[dim] % (size * (1 + is_dealt(placement))) or local[dim] == 0:
            return None
        local[dim] //= size
        folded = folded or shard_runs(placement) > 1
    return None if folded and not _runs_divide(shape, state, mesh) else tuple(local)


def _runs_divide(shape: Sequence[int], state: State, mesh: Sequence[int]) -> bool:
    """Whether cuts from end to end go between runs, and all others divide a run."""
    for dim in {shard_dim(p) for p in state if shard_runs(p) > 1}:
        cuts = [(p, n) for p, n in zip(state, mesh, strict=True) if shard_dim(p) == dim]
        (runs, *others) = {shard_runs(p) for p, _ in cuts if shard_runs(p) > 1}
        between = math.prod(n for p, n in cuts if shard_runs(p) == 1)
        assert dim is not None
        if others or runs % between or shape[dim] % runs or not _divide_a_run(shape[dim] // runs, cuts):
            return False
    return True


def _divide_a_run(length: int, cuts: Sequence[tuple[Placement, int]]) -> bool:
    for placement, parts in cuts:
        if shard_runs(placement) > 1:
            if length % (parts * (1 + is_dealt(placement))):
                return False
            length //= parts
    return True


def can_be_held(state: State) -> bool:
    """Whether somebody outside may hold a tensor so: not as summands, and cut from end to end, in order."""
    return can_be_put_in_order(state) and not any(map(is_dealt, state))


def can_be_put_in_order(state: State) -> bool:
    """Whether `in_order(state)` is a state that somebody outside may hold."""
    return PARTIAL not in state and all(shard_runs(p) == 1 for p in state)


def in_order(state: State) -> State:
    """The same dims cut, none dealt out."""
    return tuple(shard(shard_dim(p) or 0) if is_dealt(p) else p for p in state)
