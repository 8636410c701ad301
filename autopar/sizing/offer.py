"""The clusters that may be had: a preset or a file, in every size, at a price."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autopar.cluster import ClusterSpec
from autopar.cost.checks import checked_value
from autopar.errors import AutoparError, ClusterSpecError
from autopar.presets import PRESETS, find_preset

MOST_GPUS = 16384


@dataclass(frozen=True)
class Offer:
    """name: of the preset, or the path of the file. whole: the largest cluster of the kind that may be had."""

    name: str
    whole: ClusterSpec

    @property
    def price_per_hour_usd(self) -> float | None:
        """Of one device."""
        return self.whole.device.price_per_hour_usd

    @property
    def sizes(self) -> int:
        """How many sizes there are: parts of a node, and whole nodes."""
        return self.whole.devices_per_node - 1 + self.whole.nodes

    def devices(self, index: int) -> int:
        """Of the index-th size, from 0."""
        per_node = self.whole.devices_per_node
        return index + 1 if index < per_node else (index - per_node + 2) * per_node

    def index(self, devices: int) -> int:
        """Of the largest size with no more than so many devices; -1 for none."""
        per_node = self.whole.devices_per_node
        return min(devices, self.whole.devices) - 1 if devices < per_node else per_node + devices // per_node - 2


def offers(
    clusters: Sequence[str | ClusterSpec],
    *,
    dtype: str,
    max_gpus: int = MOST_GPUS,
    prices: Mapping[str, float] | None = None,
    inter_node_gbit_per_s: float | None = None,
) -> tuple[Offer, ...]:
    """What is asked for; without names, every GPU preset whose price is known and that computes in `dtype`.

    prices: USD per device-hour by name. Raises ClusterSpecError, and AutoparError for a price of nothing.
    """
    if isinstance(max_gpus, bool) or not isinstance(max_gpus, int) or max_gpus < 1:
        raise AutoparError(f"max_gpus is {max_gpus!r}; use a whole number of at least 1")
    given = dict(prices or {})
    named = [_read(one, max_gpus, inter_node_gbit_per_s) for one in clusters or _usual(dtype, given)]
    names = [offer.name for offer in named]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ClusterSpecError(f"cluster {twice} is named twice; keep one")
    for name in given:
        if name not in names:
            raise AutoparError(
                f"a price is given for {name}, but the clusters are {', '.join(names)}: name one of them"
            )
    return tuple(_priced(offer, given.get(offer.name)) for offer in named)


def _usual(dtype: str, prices: Mapping[str, float]) -> list[str]:
    def offered(name: str) -> bool:
        device = find_preset(name).device
        known = device.price_per_hour_usd is not None or name in prices
        return device.kind == "cuda" and known and dtype in dict(device.peak_flops_per_s)

    return [name for name in PRESETS if offered(name)]


def _read(cluster: str | ClusterSpec, max_gpus: int, gbit_per_s: float | None) -> Offer:
    """A preset in its largest size, or a cluster as far as it goes."""
    if isinstance(cluster, str) and not cluster.endswith(".json"):
        per_node = find_preset(cluster).devices_per_node
        most = max_gpus if max_gpus < per_node else max_gpus - max_gpus % per_node
        return Offer(cluster, ClusterSpec.preset(cluster, gpus=most, inter_node_gbit_per_s=gbit_per_s))
    spec = cluster if isinstance(cluster, ClusterSpec) else ClusterSpec.load(Path(cluster))
    if gbit_per_s is not None:
        raise ClusterSpecError(f"inter_node_gbit_per_s goes with presets; {cluster} says what its network is: edit it")
    name = spec.name if isinstance(cluster, ClusterSpec) else cluster
    most = min(max_gpus, spec.devices)
    return Offer(name, spec.part(most - most % min(most, spec.devices_per_node)))


def _priced(offer: Offer, price: float | None) -> Offer:
    if price is None:
        return offer
    usd = checked_value(price, "positive", f"the price of {offer.name}")
    device = dataclasses.replace(offer.whole.device, price_per_hour_usd=usd)
    return dataclasses.replace(offer, whole=dataclasses.replace(offer.whole, device=device))
