"""What a faster part would buy: the same decisions priced again on a cluster with one rate 10 % up.

Where `autopar profile` measured a device or a link, its curves go before the rates, so they are what gets faster: all
kernels of a device together, as a measured time does not say what it waited for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from autopar.cluster import ClusterSpec
from autopar.curves import NOTHING_MEASURED, AttentionRate, DeviceCurves, Points
from autopar.hardware import DeviceSpec

FASTER = 1.1


@dataclass(frozen=True)
class Faster:
    """The step with one part of the cluster 10 % faster."""

    what: str
    step_time_s: float
    before_s: float

    @property
    def extra_s(self) -> float:
        """What the step takes more: negative."""
        return self.step_time_s - self.before_s

    def to_dict(self) -> dict[str, Any]:
        """As data."""
        return {
            "what": self.what,
            "step_time_s": self.step_time_s,
            "extra_s": self.extra_s,
            "share": self.extra_s / self.before_s if self.before_s else 0.0,
        }


def priced_again(cluster: ClusterSpec, before_s: float, price_s: Callable[[ClusterSpec], float]) -> tuple[Faster, ...]:
    """Every part of the cluster that counts, the one that buys most first."""
    found = [Faster(what, price_s(faster), before_s) for what, faster in faster_clusters(cluster)]
    return tuple(sorted(found, key=lambda f: f.extra_s))


def faster_clusters(cluster: ClusterSpec) -> Iterator[tuple[str, ClusterSpec]]:
    """(what is faster, the cluster with it)."""
    for what, device in _faster_devices(cluster.device):
        yield what, dataclasses.replace(cluster, device=device)
    for level, link in enumerate(cluster.links):
        links = list(cluster.links)
        measured = tuple(dataclasses.replace(c, points=_quicker(c.points)) for c in link.measured)
        links[level] = dataclasses.replace(link, bytes_per_s=link.bytes_per_s * FASTER, measured=measured)
        yield f"link {link.name}", dataclasses.replace(cluster, links=tuple(links))


def _faster_devices(device: DeviceSpec) -> Iterator[tuple[str, DeviceSpec]]:
    if device.measured != NOTHING_MEASURED:
        ops = tuple(dataclasses.replace(c, points=_quicker(c.points)) for c in device.measured.ops)
        attention = tuple(map(_quicker_attention, device.measured.attention))
        yield "kernels, as measured", dataclasses.replace(device, measured=DeviceCurves(ops, attention))
        return
    rates: Any = {dtype: rate * FASTER for dtype, rate in device.peak_flops_per_s}
    yield "arithmetic", dataclasses.replace(device, peak_flops_per_s=rates)
    faster = device.memory_bytes_per_s * FASTER
    yield "memory bandwidth", dataclasses.replace(device, memory_bytes_per_s=faster)
    host = [f.name for f in dataclasses.fields(device) if f.name.startswith("host_")]
    launching = {name: getattr(device, name) / FASTER for name in (*host, "launch_overhead_s", "kernel_gap_s")}
    yield "host and launches", dataclasses.replace(device, **launching)


def _quicker_attention(rate: AttentionRate) -> AttentionRate:
    return dataclasses.replace(
        rate,
        overhead_s=rate.overhead_s / FASTER,
        flops_per_s=rate.flops_per_s * FASTER,
        bytes_per_s=rate.bytes_per_s * FASTER,
    )


def _quicker(points: Points) -> Points:
    return tuple((size, seconds / FASTER) for size, seconds in points)
