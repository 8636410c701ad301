"""Stages whose ranks are laid out differently: as many ranks each, on axes of their own.

    Layout(pp=2, dp=(2, 4), tp=(2, 1))      dp=2/4,tp=2/1 on the command line

is a stage of 2 data and 2 tensor ranks, then one of 4 data ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from autopar.errors import LayoutError


class Degrees(NamedTuple):
    """The ranks of one stage: data, context and tensor."""

    dp: int
    cp: int
    tp: int

    @property
    def ranks(self) -> int:
        """Of the stage."""
        return math.prod(self)


def several(value: Any) -> tuple[Any, ...] | None:
    """The degrees of a key that has one for each stage, (2, 4) or "2/4"; None where it has one for all."""
    if isinstance(value, str) and "/" in value:
        parts = [part.strip() for part in value.split("/")]
        return tuple(int(part) if part.isdecimal() else part for part in parts)
    return tuple(value) if isinstance(value, (tuple, list)) else None


def is_shaped(given: Any) -> bool:
    """Whether a mapping of layout keys has degrees for each stage."""
    return any(several(given.get(key)) is not None for key in Degrees._fields)


def stage_degrees(pp: int, given: dict[str, Any], devices: int | None = None) -> tuple[Degrees, ...]:
    """The degrees of every stage; LayoutError where they cannot be. devices: from which a missing dp follows."""
    columns = {key: _column(pp, key, given[key]) for key in Degrees._fields if key in given}
    for key in ("cp", "tp"):
        columns.setdefault(key, (1,) * pp)
    if "dp" not in columns:
        assert devices is not None
        columns["dp"] = tuple(_rest(devices, pp, *others) for others in zip(columns["cp"], columns["tp"], strict=True))
    found = tuple(Degrees(*row) for row in zip(*(columns[key] for key in Degrees._fields), strict=True))
    for at, one in enumerate(found):
        if one.ranks != found[0].ranks:
            raise LayoutError(
                f"layout: stage 0 has {_product(found[0])} ranks and stage {at} has {_product(one)}; give every stage "
                "as many"
            )
    return found


def _column(pp: int, key: str, value: Any) -> tuple[int, ...]:
    values = several(value) or (value,) * pp
    shown = "/".join(map(str, values))
    if len(values) != pp:
        raise LayoutError(
            f"layout: {key}={shown} has degrees for {len(values)} stages, but pp={pp}; give one for each stage, or "
            "one for all"
        )
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
        raise LayoutError(f"layout: {key}={shown} must be whole numbers of at least 1, one for each stage")
    return values


def _rest(devices: int, pp: int, cp: int, tp: int) -> int:
    if devices % (pp * cp * tp):
        raise LayoutError(
            f"layout: tp * pp * cp = {tp} * {pp} * {cp} = {pp * cp * tp} does not divide the {devices} devices of the "
            "cluster; change a degree or the cluster"
        )
    return devices // (pp * cp * tp)


def _product(one: Degrees) -> str:
    return f"dp * cp * tp = {one.dp} * {one.cp} * {one.tp} = {one.ranks}"


def widest(shapes: Sequence[Degrees]) -> Degrees:
    """Of the stage with most data ranks, on each of which a micro-batch is smallest."""
    return max(shapes, key=lambda one: one.dp)


def check_rows(shapes: Sequence[Degrees], micro_batch: int) -> None:
    """LayoutError where the samples of a micro-batch do not divide by the data ranks of every stage."""
    rows = widest(shapes).dp * micro_batch
    for at, one in enumerate(shapes):
        if rows % one.dp:
            raise LayoutError(
                f"layout: a micro-batch has dp * micro_batch = {widest(shapes).dp} * {micro_batch} = {rows} samples "
                f"(dp: of the stage with most) and does not divide by dp={one.dp} of stage {at}; change micro_batch"
            )


def common_mesh(shapes: Sequence[Degrees]) -> tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]:
    """(mesh, what its axes are for in each stage): with an axis wherever a stage goes from one degree to another.

    Tensor ranks are the innermost of every stage, then context ranks, as without different shapes.
    """
    primes = _primes(shapes[0].ranks)
    columns = [_roles(primes, one) for one in shapes]
    rows = list(zip(primes, zip(*columns, strict=True), strict=True))
    merged = [(math.prod(p for p, _ in group), roles) for roles, group in groupby(rows, key=lambda row: row[1])]
    roles = tuple(zip(*(roles for _, roles in merged), strict=True)) if merged else ((),) * len(shapes)
    return tuple(size for size, _ in merged), roles


def _primes(number: int) -> tuple[int, ...]:
    """Large ones first, as the outer axes."""
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return tuple(found[::-1])


def _roles(primes: tuple[int, ...], one: Degrees) -> tuple[str, ...]:
    """Which degree each prime is a factor of: the innermost that will do for tp, then for cp."""
    left = {"tp": Counter(_primes(one.tp)), "cp": Counter(_primes(one.cp))}
    found = []
    for prime in reversed(primes):
        role = next((key for key in ("tp", "cp") if left[key][prime]), "dp")
        if role != "dp":
            left[role][prime] -= 1
        found.append(role)
    return tuple(reversed(found))
