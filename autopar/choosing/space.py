"""Which layouts there are to choose from.

    group   tensor, context and expert degree, sequence parallelism, micro-batch: what one looks like on a rank
    cell    a group with a pipeline and a data degree: which devices do what
    leaf    a cell with ZeRO stage, schedule and interleaving; recomputation is what the memory asks for

A layout may leave devices idle: what they could do may cost more than it brings (5,128 = 8 * 641 devices make no good
mesh). Nodes that work are used whole, so that the links of the rest are those of a smaller cluster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from autopar.blocks import cut_counts, listed
from autopar.cluster import ClusterSpec
from autopar.errors import PinError
from autopar.layouts import KEYS, OFFLOAD, RECOMPUTE, Layout, check_layout
from autopar.predicting.predict import Predictor

Ints = npt.NDArray[np.int64]
LAYOUT_KEYS = frozenset(KEYS)


@dataclass(frozen=True, order=True)
class Group:
    """What one micro-batch looks like on a rank."""

    tp: int
    cp: int
    sp: bool
    micro_batch: int
    ep: int = 1
    load: float | tuple[float, ...] = 1.0

    def layout(self, pp: int, dp: int, **keys: Any) -> Layout:
        """A layout of this group."""
        return Layout(
            dp, self.tp, pp, self.cp, self.ep, micro_batch=self.micro_batch, sp=self.sp, expert_load=self.load, **keys
        )

    @property
    def least_dp(self) -> int:
        """The smallest data degree that it goes with."""
        return self.ep // math.gcd(self.ep, self.cp)


@dataclass(frozen=True)
class Space:
    """All layouts of a model on at most the devices of a cluster.

    blocks: repeated layers, at least 1. heads, kv_heads: of attention, None where there is none. tokens: of a sequence.
    selective: whether there is a core of attention to run again. pin: layout keys that are fixed. experts: of a layer.
    names: of the blocks. whole_batches: the model takes statistics of all samples of a step, which then is one
    micro-batch. to_run: only what a program can be made of today, on all devices.
    """

    cluster: ClusterSpec
    global_batch: int
    blocks: int
    heads: int | None
    kv_heads: int | None
    tokens: int
    selective: bool
    pin: Mapping[str, Any]
    experts: int = 0
    names: tuple[str, ...] = ()
    whole_batches: bool = False
    to_run: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.pin) - LAYOUT_KEYS
        if unknown:
            raise PinError(f"pin {sorted(unknown)[0]!r} is no key of a layout; the keys are {', '.join(KEYS)}")
        for key, value in self.pin.items():  # each by itself
            company = {"pp": self.pin.get("pp", 1)} if key == "cut" and value is not None else _company(key, value)
            Layout(**{key: value, **company})  # LayoutError where it cannot be
        ep, load = self.pin.get("ep", 1), self.pin.get("expert_load", 1.0)
        check_layout(Layout(dp=ep, ep=ep, expert_load=load), global_batch=ep, blocks=1, experts=self.experts)

    @staticmethod
    def of(predictor: Predictor, pin: Mapping[str, Any], *, to_run: bool = False) -> Space:
        """All layouts of what a predictor knows."""
        table = predictor.table
        cores = any(bool((block.kept != block.kept_selective).any()) for block in table.kinds)
        made = Space(
            predictor.cluster, predictor.global_batch, max(1, table.blocks), predictor.heads, predictor.kv_heads,
            table.tokens, cores, pin, table.experts, table.names, bool(predictor.sample.trace.buffer_updates), to_run,
        )  # fmt: skip
        if pin.get("cut") is not None:
            cut_counts(Layout(pp=pin["pp"], cut=pin["cut"]), table.names)
        return made

    def groups(self) -> Iterator[Group]:
        """Every group, small micro-batches first."""
        for tp in self._tensor_degrees():
            for cp in self._allowed("cp", self._context_degrees()):
                for sp in self._allowed("sp", [True, False] if tp > 1 and self.tokens > 1 else [False]):
                    if self.tokens % (cp * (tp if sp else 1)) == 0:
                        for size in self._micro_batches(cp):
                            if tp * cp <= self.cluster.devices and self.global_batch % size == 0:
                                yield from self._by_experts(Group(tp, cp, sp and tp > 1, size))

    def _by_experts(self, group: Group) -> Iterator[Group]:
        """The same with each expert degree that there are ranks and experts for."""
        degrees = self._allowed("ep", divisors(self.experts) if self.experts else [1])
        most, load = self.cluster.devices // group.tp, Layout(expert_load=self.pin.get("expert_load", 1.0)).expert_load
        for ep in degrees:
            if ep <= most:
                yield replace(group, ep=ep, load=load if ep > 1 else 1.0)

    def cells(self, group: Group) -> tuple[Ints, Ints]:
        """Pipeline and data degrees of all cells of a group."""
        ranks, share = group.tp * group.cp, self.global_batch // group.micro_batch
        most = min(self.blocks, self.cluster.devices // ranks)
        stages = [p for p in self._allowed("pp", list(range(1, most + 1))) if p <= most]
        replicas = [d for d in self._allowed("dp", divisors(share)) if share % d == 0]
        pp, dp = (a.ravel() for a in np.meshgrid(np.array(stages, np.int64), np.array(replicas, np.int64)))
        devices, per_node = ranks * pp * dp, self.cluster.devices_per_node
        usable = (devices <= self.cluster.devices) & ((devices < per_node) | (devices % per_node == 0))
        usable &= dp * group.cp % group.ep == 0
        if self.whole_batches:
            usable &= dp * group.micro_batch == self.global_batch
        if self.to_run:
            usable &= devices == self.cluster.devices
            usable &= (dp % group.ep == 0) | (group.ep == group.cp)  # as `autopar.staged.stage_axes` has axes for
        return pp[usable], dp[usable]

    def leaves(self, group: Group, pp: int, dp: int) -> Iterator[Layout]:
        """The layouts of a cell, without recomputation."""
        micro_batches = self.global_batch // (dp * group.micro_batch)
        cut = self.pin.get("cut")
        for zero in self._allowed("zero", [1, 0, 2, 3] if dp * group.cp > 1 else [0]):
            for schedule, vpp in self.schedules(pp, micro_batches):
                if zero == 2 and vpp == 1 < micro_batches and "zero" not in self.pin:
                    continue  # it would reduce every micro-batch's gradients at once
                yield group.layout(
                    pp, dp, vpp=vpp, zero=zero, schedule=schedule, grad_dtype=self.grad_dtype, offload=self.offload,
                    cut=cut,
                )  # fmt: skip

    def schedules(self, pp: int, micro_batches: int) -> list[tuple[str, int]]:
        """(schedule, stages per rank). GPipe takes as long as 1F1B and holds more: only where it is pinned."""
        if pp == 1:
            return [("none", 1)] if self._admits("vpp", 1) else []
        found = [("1f1b", 1), ("zero-bubble", 1)]
        if self.pin.get("schedule") == "gpipe":
            found = [("gpipe", 1)]
        if micro_batches % pp == 0:
            found += [("interleaved", v) for v in self._interleavings(pp) if self.pin.get("cut") is None]
        return [(s, v) for s, v in found if self._admits("schedule", s) and self._admits("vpp", v)]

    def recomputations(self) -> list[str]:
        """Kinds of recomputation, least first."""
        kinds = [kind for kind in RECOMPUTE if kind != "selective" or self.selective or "recompute" in self.pin]
        return [str(kind) for kind in self._allowed("recompute", kinds)]

    @property
    def grad_dtype(self) -> str | None:
        """In which gradients are kept; nothing to choose."""
        found: str | None = self.pin.get("grad_dtype", "float32")
        return found

    @property
    def offload(self) -> str:
        """What waits on the host as long as there is room on the devices: a step is never slower without."""
        return str(self.pin.get("offload", "none"))

    @property
    def offloads(self) -> list[str]:
        """What may wait on the host, least first."""
        linked = self.cluster.device.host_link_bytes_per_s > 0
        return [self.offload] if "offload" in self.pin or not linked else list(OFFLOAD)

    def conflict(self) -> str:
        """Which pin cannot be, in words that follow a sentence; "" where it takes several together."""
        pin = self.pin
        stages = pin.get("pp", 1) * pin.get("vpp", 1)
        if stages > self.blocks:
            blocks = f"{self.blocks} block{'' if self.blocks == 1 else 's'}{listed(self.names)}"
            return f": {' and '.join(f'{k}={pin[k]}' for k in ('pp', 'vpp') if k in pin)}, but the model has {blocks}"
        if not self._tensor_degrees():
            return f": tp={pin.get('tp')} does not go with {self.heads} heads on {self.cluster.devices} devices"
        if pin.get("ep", 1) > 1 and (pin.get("dp", pin["ep"]) * pin.get("cp", pin["ep"])) % pin["ep"]:
            return f": ep={pin['ep']} does not divide dp * cp, from whose ranks those of the experts are taken"
        share = pin.get("dp", 1) * pin.get("micro_batch", 1)
        if self.global_batch % share:
            return f": the global batch of {self.global_batch} does not divide by dp and micro_batch"
        if self.whole_batches and "micro_batch" in pin:
            return (
                f": the model takes statistics of the whole batch of {self.global_batch} (as batch norm does), so that "
                f"micro_batch={pin['micro_batch']} takes dp={self.global_batch // pin['micro_batch']}"
            )
        if self.to_run:
            if pin.get("ep", 1) > 1 and pin.get("dp", pin["ep"]) % pin["ep"] and pin.get("cp", pin["ep"]) != pin["ep"]:
                return f": ep={pin['ep']} neither divides dp nor is cp, and experts on some of both ranks cannot be run"
            return f": none of them works on all {self.cluster.devices} devices, and ranks without work cannot be run"
        return ""

    # -- degrees ----------------------------------------------------------------------------

    def _tensor_degrees(self) -> list[int]:
        if self.heads is None:
            return self._allowed("tp", powers_of_two(self.cluster.devices_per_node))
        shared = self.kv_heads or self.heads
        found = [d for d in divisors(self.heads) if shared % d == 0 or d % shared == 0]
        return [d for d in found if d <= self.cluster.devices and self._admits("tp", d)]

    def _context_degrees(self) -> list[int]:
        return [d for d in powers_of_two(self.cluster.devices) if d == 1 or (self.tokens > 1 and self.tokens % d == 0)]

    def _micro_batches(self, cp: int) -> list[int]:
        """Twice the context degree and twice the micro-batch are the same rows on a rank, and more to exchange."""
        free = cp > 1 and not {"dp", "cp"} & set(self.pin)
        return [n for n in self._allowed("micro_batch", divisors(self.global_batch)) if n % 2 or not free]

    def _interleavings(self, pp: int) -> list[int]:
        """Stages per rank, one for each number of blocks that a stage may hold."""
        per_rank = self.blocks // pp
        return sorted({self.blocks // (pp * size) for size in range(1, per_rank + 1)} - {0, 1})

    def _allowed(self, key: str, values: list[Any]) -> list[Any]:
        return [self.pin[key]] if key in self.pin else values

    def _admits(self, key: str, value: Any) -> bool:
        return key not in self.pin or self.pin[key] == value


@cache
def divisors(number: int) -> list[int]:
    """All, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4 ... up to `most`."""
    return [1 << k for k in range(most.bit_length()) if 1 << k <= most]


def _company(key: str, value: Any) -> dict[str, Any]:
    """What a pinned key needs beside it to be a layout at all."""
    if key == "vpp" and value != 1:
        return {"pp": 2}
    if key == "schedule" and value != "none":
        return {"pp": 2, "vpp": 2 if value == "interleaved" else 1}
    if key == "recompute_blocks" and value is not None:
        return {"recompute": "full"}
    if key == "ep":
        return {"dp": value}
    return {}
