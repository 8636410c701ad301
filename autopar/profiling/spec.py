"""From measurements to a cluster description: curves as they are, and the rates that stand where no curve does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.cluster import DeviceSpec, LinkSpec
from autopar.curves import AttentionRate, CollectiveCurve, DeviceCurves, OpCurve
from autopar.errors import RuntimeFailure
from autopar.presets import PRESETS

_DIGITS = 4  # of a measured figure; the rest is noise


@dataclass(frozen=True)
class DeviceFacts:
    """What the device says of itself. name: as in the file; memory in bytes."""

    name: str
    kind: str
    memory_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Measured:
    """What was measured on one device."""

    launch_s: float
    view_s: float
    ops: tuple[OpCurve, ...]
    attention: tuple[AttentionRate, ...]


def device_spec(facts: DeviceFacts, measured: Measured) -> DeviceSpec:
    """The device. Its peaks are the maker's where a preset knows this device, else the best rates measured."""
    stated = _stated(facts.name)
    matmuls = {curve.dtype: curve for curve in measured.ops if curve.op == "matmul"}
    best = {dtype: max(size / seconds for size, seconds in curve.points) for dtype, curve in matmuls.items()}
    peaks = {dtype: max(rate, stated.get(dtype, 0.0)) for dtype, rate in best.items()}
    streaming = max(bytes_ / s for c in measured.ops if c.op == "elementwise" for bytes_, s in c.points[-1:])
    leading = max(best, key=lambda dtype: best[dtype])
    rate = best[leading]
    attention = [a.flops_per_s / peaks[a.dtype] for a in measured.attention if a.dtype in peaks]
    return DeviceSpec(
        name=facts.name,
        kind=facts.kind,
        memory_bytes=facts.memory_bytes,
        reserved_bytes=facts.reserved_bytes,
        memory_bytes_per_s=rounded(streaming),
        memory_efficiency_fraction=1.0,
        peak_flops_per_s=tuple((dtype, rounded(peak)) for dtype, peak in sorted(peaks.items())),
        matmul_efficiency_fraction=min(1.0, rounded(rate / peaks[leading])),
        matmul_ramp_s=rounded(_ramp(matmuls[leading], rate, measured.launch_s)),
        attention_efficiency_fraction=min(1.0, rounded(max(attention, default=0.5))),
        launch_overhead_s=rounded(measured.launch_s),
        view_overhead_s=rounded(measured.view_s),
        measured=DeviceCurves(
            tuple(OpCurve(c.op, c.dtype, _floored(c.points, measured.launch_s)) for c in measured.ops),
            tuple(
                AttentionRate(a.direction, a.dtype, *map(rounded, (a.overhead_s, a.flops_per_s, a.bytes_per_s)))
                for a in measured.attention
            ),
        ),
    )


def link_spec(name: str, curves: Sequence[CollectiveCurve]) -> tuple[LinkSpec, float]:
    """A link, and the launch of a collective on it.

    With n ranks a small all-gather is launch + (n - 1) hops, a small all-reduce launch + 2 (n - 1) hops (the steps of
    the cost model); of a large all-gather (n - 1) / n of the bytes pass each rank.
    """
    by_kind = {(c.kind, c.ranks): c for c in curves}
    ranks = max(c.ranks for c in curves)
    gather, reduce = by_kind["all_gather", ranks], by_kind["all_reduce", ranks]
    small_gather, small_reduce = gather.points[0][1], reduce.points[0][1]
    latency = min(max(small_reduce - small_gather, 0.0), small_gather) / (ranks - 1)
    launch = max(small_gather - (ranks - 1) * latency, 0.0)
    nbytes, seconds = gather.points[-1]
    moving = max(seconds - small_gather, seconds / 10)  # what is left if the largest is hardly slower than the smallest
    rate = (ranks - 1) / ranks * nbytes / moving
    rounded_curves = tuple(CollectiveCurve(c.kind, c.ranks, _floored(c.points, 0.0)) for c in curves)
    return LinkSpec(name, rounded(rate), 1.0, rounded(latency), rounded_curves), rounded(launch)


def rounded(value: float) -> float:
    """To as many digits as a measurement has."""
    return float(f"{value:.{_DIGITS}g}")


def _floored(points: Sequence[tuple[float, float]], floor_s: float) -> tuple[tuple[float, float], ...]:
    """Rounded; no op is faster than a launch."""
    return tuple((size, rounded(max(seconds, floor_s))) for size, seconds in points)


def _ramp(curve: OpCurve, rate: float, launch_s: float) -> float:
    """The median of what matmuls below a tenth of the largest take beyond their launch and their FLOPs at full rate."""
    largest = curve.points[-1][0]
    left = sorted(max(s - launch_s - flops / rate, 0.0) for flops, s in curve.points if flops <= largest / 10)
    return left[len(left) // 2] if left else 0.0


def _stated(name: str) -> dict[str, float]:
    known = [p for p in PRESETS.values() if p.cuda_name and p.cuda_name in name]
    return dict(known[0].device.peak_flops_per_s) if known else {}


def check_facts(facts: DeviceFacts) -> DeviceFacts:
    """Refuse a device that leaves a program no memory."""
    if facts.reserved_bytes >= facts.memory_bytes:
        raise RuntimeFailure(
            f"{facts.name}: {facts.reserved_bytes} of {facts.memory_bytes} bytes are taken before a program starts; "
            "end what else runs on it, or start fewer processes"
        )
    return facts
