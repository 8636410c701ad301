"""Measured times by size, as `autopar profile` writes them into a cluster file.

A curve is a list of (size, seconds) points. Between two points the time is a straight
line; below the first it stays at the first (nothing is faster than a launch); beyond the
last it grows in proportion to the size. Sizes rise strictly and seconds never fall, so
that the time of an op never falls when its work grows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from autopar.cost.checks import Count, Name, NonNegative, Positive, checked, checked_value
from autopar.errors import ClusterSpecError

MAX_POINTS, MAX_CURVES = 64, 1024  # a profile has a dozen points a curve and a hundred curves

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class OpCurve:
    """One kind of op on one device.

    op: the name of an ATen op ("gelu"), a class of ops ("matmul", "elementwise", see `autopar.cost.compute`), or
        "optimizer": the update of one parameter.
    dtype: of the operands, as in "bfloat16".
    points: (FLOPs, seconds) for matrix products and convolutions, else (bytes read and written, seconds).
    """

    op: Name
    dtype: Name
    points: Points

    def __post_init__(self) -> None:
        checked(self, "curve")
        object.__setattr__(self, "points", checked_points(self.points, "curve.points"))

    def seconds(self, size: float) -> float:
        """Seconds at a size."""
        return interpolated(self.points, size)


@dataclass(frozen=True)
class AttentionRate:
    """Scaled dot product attention: seconds = overhead_s + FLOPs / flops_per_s + bytes / bytes_per_s.

    direction: "forward" or "backward".
    """

    direction: Name
    dtype: Name
    overhead_s: NonNegative
    flops_per_s: Positive
    bytes_per_s: Positive

    def __post_init__(self) -> None:
        checked(self, "attention")
        if self.direction not in ("forward", "backward"):
            raise ClusterSpecError(f"attention.direction is {self.direction!r}; use forward or backward")


@dataclass(frozen=True)
class CollectiveCurve:
    """One kind of collective in groups of `ranks` on one link.

    points: (bytes, seconds); bytes as in `autopar.cost.collectives`.
    """

    kind: Name
    ranks: Count
    points: Points

    def __post_init__(self) -> None:
        checked(self, "curve")
        object.__setattr__(self, "points", checked_points(self.points, "curve.points"))

    def seconds(self, nbytes: float) -> float:
        """Seconds at a number of bytes."""
        return interpolated(self.points, nbytes)


@dataclass(frozen=True)
class DeviceCurves:
    """All that was measured of a device beyond its rates; empty where nothing was."""

    ops: tuple[OpCurve, ...] = ()
    attention: tuple[AttentionRate, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ops", _only(self.ops, OpCurve, "device.measured.ops"))
        object.__setattr__(self, "attention", _only(self.attention, AttentionRate, "device.measured.attention"))
        once(((c.op, c.dtype) for c in self.ops), "device.measured.ops")
        once(((a.direction, a.dtype) for a in self.attention), "device.measured.attention")

    def curve(self, names: Sequence[str], dtypes: Sequence[str]) -> OpCurve | None:
        """The curve of the first of `names` that has one in any of `dtypes`, in that order; None without one."""
        found = (self._by_op.get((name, dtype)) for name in names for dtype in dtypes)
        return next((curve for curve in found if curve is not None), None)

    def attention_rate(self, direction: str, dtype: str) -> AttentionRate | None:
        """The measured attention in this direction and dtype, if there is one."""
        return next((a for a in self.attention if (a.direction, a.dtype) == (direction, dtype)), None)

    @cached_property
    def _by_op(self) -> dict[tuple[str, str], OpCurve]:
        return {(curve.op, curve.dtype): curve for curve in self.ops}

    @cached_property
    def _hash(self) -> int:
        return hash((self.ops, self.attention))

    def __hash__(self) -> int:
        """Computed once: devices are keys of caches that are asked thousands of times."""
        return self._hash


def interpolated(points: Points, size: float) -> float:
    """Seconds at `size`, see the module docstring."""
    if size <= points[0][0]:
        return points[0][1]
    last_size, last_s = points[-1]
    if size >= last_size:
        return last_s * (size / last_size)
    at = bisect_left(points, (size,))
    (size0, s0), (size1, s1) = points[at - 1], points[at]
    return s0 + (s1 - s0) * ((size - size0) / (size1 - size0))


def checked_points(points: object, where: str) -> Points:
    """(size, seconds) pairs that make a curve; ClusterSpecError for anything else."""
    if not isinstance(points, (list, tuple)) or not 1 <= len(points) <= MAX_POINTS:
        raise ClusterSpecError(f"{where} must be a list of 1 to {MAX_POINTS} pairs [size, seconds]; measure again")
    found: list[tuple[float, float]] = []
    for index, pair in enumerate(points):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ClusterSpecError(f"{where}[{index}] is no pair [size, seconds]; use two numbers")
        size, seconds = (checked_value(number, "positive", f"{where}[{index}]") for number in pair)
        if found and (size <= found[-1][0] or seconds < found[-1][1]):
            raise ClusterSpecError(
                f"{where}[{index}] is [{size:g}, {seconds:g}] after [{found[-1][0]:g}, {found[-1][1]:g}]; sizes must "
                "rise and seconds must not fall"
            )
        found.append((size, seconds))
    return tuple(found)


def rising(points: Iterable[tuple[float, float]]) -> Points:
    """Measured points in order of size, each at least as slow as the one before it (a smaller size that took longer
    was disturbed: the larger one bounds it); the mean where a size stands twice."""
    by_size: dict[float, list[float]] = {}
    for size, seconds in points:
        by_size.setdefault(size, []).append(seconds)
    found: list[tuple[float, float]] = []
    ceiling = float("inf")
    for size in sorted(by_size, reverse=True):
        ceiling = min(ceiling, sum(by_size[size]) / len(by_size[size]))
        found.append((size, ceiling))
    return tuple(reversed(found))


_T = TypeVar("_T")


def _only(items: Any, kind: type[_T], where: str) -> tuple[_T, ...]:
    found = tuple(items)
    if len(found) > MAX_CURVES or not all(isinstance(item, kind) for item in found):
        raise ClusterSpecError(f"{where} must hold at most {MAX_CURVES} entries of type {kind.__name__}; measure again")
    return found


def once(keys: Iterable[tuple[object, ...]], where: str) -> None:
    """Refuse two entries of one key: which of them would count?"""
    seen = set()
    for key in keys:
        if key in seen:
            raise ClusterSpecError(f"{where} has two entries for {' '.join(map(str, key))}; keep one")
        seen.add(key)


NOTHING_MEASURED = DeviceCurves()
