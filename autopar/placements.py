"""The vocabulary of placements.

A *placement* says how one tensor lies on one mesh axis, as a short string that is
also what users write in pins and what plan files hold:

    "R"      every rank of the axis holds the whole tensor
    "S(d)"   dim d is cut into equal parts, one a rank, in rank order
    "S(d/k)" dim d is k runs one after the other (the sequences of a batch, written in a row: see `Fold`); each run is
             cut into equal parts
    "P"      every rank holds a summand; the tensor is their sum

Rows in groups (those that experts work on, `autopar.grouping`) can also be cut by what they are, in parts of
sizes that only the run knows. Nothing is converted to or from these; the moves to groups and back make and take them.

    "L(d)"   a rank has the rows of the tokens that it holds, and they stand in their groups' order among themselves
    "E(d)"   a rank has the rows of its share of the groups, one share a rank, in rank order

A *state* is a tuple with one placement per mesh axis. Where two axes cut the same
dim, the earlier axis cuts first (it is the outer one). Shards are always even: a
dim that does not divide is not cut.
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

_SHARD = re.compile(r"[SLE]\((\d+)(?:/([1-9]\d*))?\)\Z")


@dataclass(frozen=True)
class Fold:
    """That dims of `length` are `runs` sequences in a row: what a model makes of [batch, sequence] before a product."""

    length: int
    runs: int

    @property
    def run(self) -> int:
        """The length of one sequence."""
        return self.length // self.runs


@cache
def shard(dim: int, runs: int = 1) -> Placement:
    """The placement that cuts dim `dim` (not negative), or each of the runs that it is made of."""
    if dim < 0:
        raise ValueError(f"a shard dim counts from the front, got {dim}")
    return f"S({dim})" if runs == 1 else f"S({dim}/{runs})"


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
    """Into how many runs a placement takes the dim that it cuts: 1 but for "S(d/k)"."""
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
    """Whether `text` is one of "R", "P", "S(d)", "S(d/k)", "L(d)", "E(d)"."""
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
        if dim >= len(local) or local[dim] % size or local[dim] == 0:
            return None
        local[dim] //= size
        folded = folded or shard_runs(placement) > 1
    return None if folded and not _runs_divide(shape, state, mesh) else tuple(local)


def _runs_divide(shape: Sequence[int], state: State, mesh: Sequence[int]) -> bool:
    """Whether cuts from end to end go between runs, and all others divide a run."""
    for dim in {shard_dim(p) for p in state if shard_runs(p) > 1}:
        cuts = [(shard_runs(p), n) for p, n in zip(state, mesh, strict=True) if shard_dim(p) == dim]
        (runs, *others) = {k for k, _ in cuts if k > 1}
        between = math.prod(n for k, n in cuts if k == 1)
        inside = math.prod(n for k, n in cuts if k > 1)
        assert dim is not None
        if others or runs % between or shape[dim] % runs or (shape[dim] // runs) % inside:
            return False
    return True


def can_be_held(state: State) -> bool:
    """Whether somebody outside may hold a tensor so: not as summands, and cut from end to end."""
    return PARTIAL not in state and all(shard_runs(p) == 1 for p in state)
