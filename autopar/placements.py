"""The vocabulary of placements.

A *placement* says how one tensor lies on one mesh axis, as a short string that is
also what users write in pins and what plan files hold:

    "R"      every rank of the axis holds the whole tensor
    "S(d)"   dim d is cut into equal parts, one a rank, in rank order
    "P"      every rank holds a summand; the tensor is their sum

A *state* is a tuple with one placement per mesh axis. Where two axes cut the same
dim, the earlier axis cuts first (it is the outer one). Shards are always even: a
dim that does not divide is not cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

Placement = str
State = tuple[Placement, ...]

REPLICATE: Placement = "R"
PARTIAL: Placement = "P"

_SHARD = re.compile(r"S\((\d+)\)\Z")


@cache
def shard(dim: int) -> Placement:
    """The placement that cuts dim `dim` (not negative)."""
    if dim < 0:
        raise ValueError(f"a shard dim counts from the front, got {dim}")
    return f"S({dim})"


@cache
def shard_dim(placement: Placement) -> int | None:
    """The dim a placement cuts, or None for "R" and "P"."""
    match = _SHARD.match(placement)
    return int(match.group(1)) if match else None


def is_placement(text: str) -> bool:
    """Whether `text` is one of "R", "P", "S(d)"."""
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
    for placement, size in zip(state, mesh, strict=True):
        dim = shard_dim(placement)
        if dim is None:
            continue
        if dim >= len(local) or local[dim] % size or local[dim] == 0:
            return None
        local[dim] //= size
    return tuple(local)
