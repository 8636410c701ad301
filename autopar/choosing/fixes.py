"""What to change about a layout that does not fit: the smallest single changes, each priced.

Every kind of change is a row of candidates, smallest first. The first that is possible and fits is the fix, so one step
less of it would not fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from autopar.choosing.space import divisors, powers_of_two
from autopar.cluster import ClusterSpec
from autopar.errors import ClusterSpecError, LayoutError
from autopar.fixes import Fix, in_order
from autopar.layouts import Layout
from autopar.predicting.predict import Predictor
from autopar.presets import PRESETS
from autopar.units import bytes_text

MOST_NODES = 64  # times as many as there are; beyond, nobody looks
_DEGREES = ("dp", "pp", "tp", "cp")
_FOLLOW = ("sp", "schedule")  # from a degree, where nothing is said


def fixes_of(predictor: Predictor, layout: Layout) -> tuple[Fix, ...]:
    """The smallest single changes each of which makes a layout fit, the cheapest first; () if it fits."""
    if fits(predictor, layout):
        return ()
    return in_order(_Finder(predictor, layout).all())


def fits(predictor: Predictor, layout: Layout) -> bool:
    """Whether a layout is possible and stays within the limit."""
    try:
        predictor.check(layout)
    except LayoutError:
        return False
    return predictor.memory(layout).total <= predictor.limit_bytes


class _Finder:
    def __init__(self, predictor: Predictor, layout: Layout) -> None:
        self.predictor, self.layout = predictor, layout
        self.base_s = predictor.price(layout).step_time_s / predictor.global_batch

    def all(self) -> Iterator[Fix]:
        """One of each kind that helps."""
        rows: list[Iterable[Layout]] = [
            self._micro_batches(), self._selective(), self._blocks(), self._zero(), self._offload(), self._sequence(),
            self._schedules(), self._experts(),
            *(self._degree(name) for name in _DEGREES[1:]),
        ]  # fmt: skip
        for row in rows:
            found = next((one for one in row if fits(self.predictor, one)), None)
            if found is not None:
                yield self._fix(_difference(self.layout, found), {}, self.predictor, found)
        for find in (
            self._smaller_batch,
            self._shorter_sequences,
            self._more_nodes,
            self._more_memory,
            self._other_device,
        ):
            fix = find()
            if fix is not None:
                yield fix

    # -- other layouts on the same devices -------------------------------------------------

    def _micro_batches(self) -> Iterator[Layout]:
        """Smaller ones, the largest first."""
        layout = self.layout
        for size in reversed(divisors(self.predictor.global_batch // layout.dp)):
            if size < layout.micro_batch:
                yield replace(layout, micro_batch=size)

    def _selective(self) -> Iterator[Layout]:
        blocks = self.predictor.table.kinds
        if self.layout.recompute == "none" and any((b.kept != b.kept_selective).any() for b in blocks):
            yield replace(self.layout, recompute="selective")

    def _blocks(self) -> Iterator[Layout]:
        """More and more blocks that run again."""
        most = max(s.blocks for s in self.predictor.stages(self.layout))
        known = self.layout.recompute_blocks if self.layout.recompute == "full" else 0
        for blocks in range((most if known is None else known) + 1, most + 1):
            yield replace(self.layout, recompute="full", recompute_blocks=None if blocks == most else blocks)

    def _zero(self) -> Iterator[Layout]:
        for stage in range(self.layout.zero + 1, 4) if self.layout.dp * self.layout.cp > 1 else ():
            yield replace(self.layout, zero=stage)

    def _offload(self) -> Iterator[Layout]:
        if self.layout.offload == "none":
            yield replace(self.layout, offload="optimizer")

    def _sequence(self) -> Iterator[Layout]:
        if self.layout.tp > 1 and not self.layout.sp:
            yield replace(self.layout, sp=True)

    def _schedules(self) -> Iterator[Layout]:
        """Such as hold fewer micro-batches."""
        layout = self.layout
        for vpp in range(layout.vpp - 1, 1, -1):
            yield replace(layout, vpp=vpp)
        if layout.schedule not in ("none", "1f1b"):
            yield replace(layout, vpp=1, schedule="1f1b")

    def _experts(self) -> Iterator[Layout]:
        """On more of the data ranks."""
        for more in divisors(self.predictor.table.experts) if self.predictor.table.experts else ():
            if more > self.layout.ep and (self.layout.dp * self.layout.cp) % more == 0:
                yield replace(self.layout, ep=more)

    def _degree(self, name: str) -> Iterator[Layout]:
        """More of one degree and less data parallelism."""
        degree, ranks = getattr(self.layout, name), self.layout.dp * getattr(self.layout, name)
        for more in self._degrees(name):
            replicas = ranks // more * (more if name == "cp" else self.layout.cp)
            if degree < more <= ranks and ranks % more == 0 and replicas % self.layout.ep == 0:
                yield self._with(**{name: more, "dp": ranks // more})

    def _degrees(self, name: str) -> list[int]:
        """All that the model or the batch can be cut by, ascending."""
        of, tokens = self.predictor, self.predictor.table.tokens
        most = MOST_NODES * of.cluster.devices
        if name == "dp":
            return divisors(of.global_batch // self.layout.micro_batch)
        if name == "pp":
            return list(range(1, max(1, of.table.blocks) + 1))
        if name == "tp":
            return powers_of_two(of.cluster.devices_per_node) if of.heads is None else divisors(of.heads)
        return [d for d in powers_of_two(min(tokens, most)) if tokens % d == 0]

    def _with(self, **degrees: int) -> Layout:
        """The layout with other degrees; what follows from them follows."""
        keys = {**self.layout.to_dict(), **degrees}
        if "pp" in degrees:
            del keys["cut"]
        for key, degree in (("sp", "tp"), ("schedule", "pp")):
            if getattr(self.layout, degree) == 1 or keys[degree] == 1:
                del keys[key]
        return Layout(**keys)

    # -- another batch, more devices, more memory -------------------------------------------

    def _smaller_batch(self) -> Fix | None:
        """The largest batch with which fewer micro-batches are in flight."""
        layout, of = self.layout, self.predictor
        share = layout.dp * layout.micro_batch
        low, high = 0, layout.micro_batches(of.global_batch)  # micro-batches that fit, and that do not
        step = layout.pp if layout.schedule == "interleaved" else 1
        low, high = low // step, high // step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(with_batch(of, middle * step * share), layout) else (low, middle)
        if not low:
            return None
        batch = low * step * share
        what = f"a global batch of {batch} instead of {of.global_batch}"
        return self._fix(what, {"global_batch": batch}, with_batch(of, batch), layout)

    def _shorter_sequences(self) -> Fix | None:
        """Half of them, and so on, where micro-batches are as small as they get; slower: by the token."""
        if self.layout.micro_batch > 1:
            return None
        for parts, there in shorter(self.predictor):
            if fits(there, self.layout):
                what = f"sequences of {there.table.tokens} tokens instead of {self.predictor.table.tokens}"
                fix = self._fix(what, {"seq": there.table.tokens}, there, self.layout)
                return dataclasses.replace(fix, slower=(1 + (fix.slower or 0.0)) * parts - 1)
        return None

    def _more_nodes(self) -> Fix | None:
        """The fewest nodes on which more of one degree makes it fit."""
        found: list[Fix] = []
        for name in _DEGREES:
            for layout in self._grown(name):
                cluster = grown(self.predictor.cluster, layout.devices)
                if cluster is None or (found and layout.devices > min(fix.devices for fix in found)):
                    break
                there = moved(self.predictor, cluster)
                if fits(there, layout):
                    change, words = more_devices(self.predictor.cluster, cluster)
                    words = f"{words} with {_difference(self.layout, layout)}"
                    found.append(self._fix(words, change, there, layout))
                    break
        return min(found, key=lambda fix: (fix.devices, fix.step_time_s), default=None)

    def _grown(self, name: str) -> Iterator[Layout]:
        per_node = self.predictor.cluster.devices_per_node
        degree, others = getattr(self.layout, name), self.layout.devices // getattr(self.layout, name)
        for more in self._degrees(name):
            devices = others * more
            if more > degree and devices % per_node == 0 and devices <= MOST_NODES * self.predictor.cluster.devices:
                yield self._with(**{name: more})

    def _more_memory(self) -> Fix:
        of, needed = self.predictor, math.ceil(self.predictor.memory(self.layout).total)
        change = {"memory_limit_bytes": needed}
        return self._fix(memory_words(of.cluster, needed), change, with_limit(of, needed), self.layout)

    def _other_device(self) -> Fix | None:
        """The preset with the least memory that is enough."""
        needed = self.predictor.memory(self.layout).total
        for name, cluster in other_devices(self.predictor, needed):
            there = moved(self.predictor, cluster)
            there.limit_bytes = cluster.device.usable_bytes
            if fits(there, self.layout):
                words = f"{name} with {bytes_text(cluster.device.usable_bytes)} to use"
                return self._fix(words, {"cluster": name}, there, self.layout)
        return None

    def _fix(self, what: str, change: dict[str, Any], there: Predictor, layout: Layout) -> Fix:
        """Priced where it fits."""
        before, after = self.layout.to_dict(), layout.to_dict()
        change = {**change, **{key: value for key, value in after.items() if value != before[key]}}
        made = there.price(layout)
        slower = made.step_time_s / there.global_batch / self.base_s - 1
        return Fix(what, change, after, there.cluster.devices, made.step_time_s, made.peak_bytes, slower)


def shorter(predictor: Predictor) -> Iterator[tuple[int, Predictor]]:
    """(parts, the same for sequences cut in so many), the longest first; none where there are no sequences."""
    for parts in (2, 4, 8):
        if predictor.table.tokens > parts and predictor.table.tokens % parts == 0:
            there = predictor.with_tokens(predictor.table.tokens // parts)
            if there is not None:
                yield parts, there


def moved(predictor: Predictor, cluster: ClusterSpec) -> Predictor:
    """The same model and batch on another cluster."""
    made = predictor.on(cluster)
    made.forget_prices()
    return made


def grown(cluster: ClusterSpec, devices: int) -> ClusterSpec | None:
    """The cluster with more nodes; None where it does not say how they are connected."""
    try:
        return dataclasses.replace(cluster, nodes=devices // cluster.devices_per_node)
    except ClusterSpecError:
        return None


def more_devices(before: ClusterSpec, after: ClusterSpec) -> tuple[dict[str, Any], str]:
    """The change, and what to say of it."""
    more = after.nodes - before.nodes
    return {"nodes": after.nodes}, f"{more} more node{'s' if more > 1 else ''} of {before.devices_per_node}"


def memory_words(cluster: ClusterSpec, needed: int) -> str:
    """Where so many bytes could come from."""
    if needed <= cluster.device.usable_bytes:
        return f"a memory limit of {bytes_text(needed)} (the device has as much)"
    return f"devices with {bytes_text(needed)} to use"


def other_devices(predictor: Predictor, needed_bytes: float) -> Iterator[tuple[str, ClusterSpec]]:
    """(preset, as many of it) with more memory than there is, the least first; none if what there is would do."""
    cluster = predictor.cluster
    if cluster.device.kind != "cuda" or needed_bytes <= cluster.device.usable_bytes:
        return
    for preset in sorted(PRESETS.values(), key=lambda p: p.device.usable_bytes):
        if preset.device.kind == "cuda" and preset.device.usable_bytes > cluster.device.usable_bytes:
            try:
                there = ClusterSpec.preset(preset.name, gpus=cluster.devices)
                for dtype in {predictor.table.dtype, "float32"}:
                    there.device.peak_flops(dtype)
            except ClusterSpecError:  # so many do not fill its nodes, or it does not compute in this dtype
                continue
            yield preset.name, there


def with_limit(predictor: Predictor, limit_bytes: int) -> Predictor:
    """The same on devices that give so many bytes."""
    made = predictor.on(predictor.cluster)
    made.limit_bytes = limit_bytes
    return made


def with_batch(predictor: Predictor, batch: int) -> Predictor:
    """The same with another global batch."""
    made = predictor.on(predictor.cluster)
    made.global_batch = batch
    return made


def _difference(before: Layout, after: Layout) -> str:
    """What a person would type: `micro_batch 4 to 2`."""
    old, new = before.to_dict(), after.to_dict()
    keys = [key for key in new if new[key] != old[key]]
    if keys == ["offload"]:
        return "offload optimizer state"
    words = [f"{k}={new[k]}" if k.startswith("recompute") else f"{k} {_word(old[k])} to {_word(new[k])}" for k in keys]
    leading = [w for w, k in zip(words, keys, strict=True) if k not in _FOLLOW or set(keys) <= set(_FOLLOW)]
    return ", ".join(leading)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
