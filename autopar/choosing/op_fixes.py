"""What to change where no plan op by op fits: single changes, each of which was planned again and fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autopar.choosing.fixes import grown, memory_words, more_devices
from autopar.choosing.free_fixes import DEFAULT_TIME_S
from autopar.choosing.space import LAYOUT_KEYS
from autopar.cluster import ClusterSpec
from autopar.errors import AutoparError, Infeasible
from autopar.fixes import Fix, in_order
from autopar.plans import Plan
from autopar.presets import PRESETS
from autopar.units import bytes_text

MOST_TIMES = 4  # as many nodes as there are, or as long as it took to find that nothing fits


@dataclass(frozen=True)
class Question:
    """What was asked. limit_bytes: None for what the device can give. attempt_s: what the answer took."""

    cluster: ClusterSpec
    global_batch: int
    pin: Mapping[str, Any]
    limit_bytes: int | None
    attempt_s: float


@dataclass(frozen=True)
class Attempt:
    """The same question after one change. batch: None as it is. limit_bytes: as in `Question`."""

    what: str
    change: Mapping[str, Any]
    cluster: ClusterSpec
    batch: int | None
    limit_bytes: int | None
    pin: Mapping[str, Any]


Answer = Callable[[Attempt, float], Plan]  # seconds that it may take; raises AutoparError where there is none


def explained(error: Infeasible, asked: Question, answer: Answer, time_limit_s: float) -> Infeasible:
    """The error with the smallest change of each kind that helps.

    No attempt is begun with less time left than the question itself took, and all together take a few times as long.
    """
    time_limit_s = min(time_limit_s, max(DEFAULT_TIME_S, MOST_TIMES * asked.attempt_s))
    deadline, found = time.perf_counter() + time_limit_s, []
    for row in _rows(error, asked):
        for attempt in row:
            left_s = deadline - time.perf_counter()
            if left_s < asked.attempt_s:
                break
            try:
                plan = answer(attempt, left_s)
            except AutoparError:  # it does not fit either, or cannot be
                continue
            found.append(_fix(attempt, plan))
            break
    return error.with_fixes(in_order(found))


def _fix(attempt: Attempt, plan: Plan) -> Fix:
    figures = plan.predicted
    return Fix(
        attempt.what, attempt.change, plan.layout_keys, attempt.cluster.devices, float(figures["step_time_s"]),
        int(figures["peak_bytes"]),
    )  # fmt: skip


def _rows(error: Infeasible, asked: Question) -> Iterator[Iterator[Attempt]]:
    if error.needed_bytes is None:
        return
    yield _more_memory(error.needed_bytes, asked)
    yield _on_the_host(asked)
    yield _smaller_batches(asked)
    yield _more_nodes(asked)
    yield _other_devices(error.needed_bytes, asked)


def _more_memory(needed: int, asked: Question) -> Iterator[Attempt]:
    words = memory_words(asked.cluster, needed)
    yield Attempt(words, {"memory_limit_bytes": needed}, asked.cluster, None, needed, asked.pin)


def _on_the_host(asked: Question) -> Iterator[Attempt]:
    """The optimizer's state, in a plan by degrees."""
    if asked.cluster.device.host_link_bytes_per_s and "offload" not in asked.pin and asked.pin.keys() <= LAYOUT_KEYS:
        change = {"offload": "optimizer"}
        pin = {**asked.pin, **change}
        yield Attempt("offload optimizer state", change, asked.cluster, None, asked.limit_bytes, pin)


def _smaller_batches(asked: Question) -> Iterator[Attempt]:
    """Half of it, and so on, as far as more nodes are looked for."""
    parts = 2
    while parts <= MOST_TIMES and asked.global_batch % parts == 0:
        batch = asked.global_batch // parts
        what = f"a global batch of {batch} instead of {asked.global_batch}"
        yield Attempt(what, {"global_batch": batch}, asked.cluster, batch, asked.limit_bytes, asked.pin)
        parts *= 2


def _more_nodes(asked: Question) -> Iterator[Attempt]:
    """Twice as many, and so on."""
    times = 2
    while times <= MOST_TIMES:
        cluster = grown(asked.cluster, times * asked.cluster.devices)
        if cluster is not None:
            change, words = more_devices(asked.cluster, cluster)
            yield Attempt(words, change, cluster, None, asked.limit_bytes, asked.pin)
        times *= 2


def _other_devices(needed: int, asked: Question) -> Iterator[Attempt]:
    """Presets with more memory, the least first; none if what there is would do."""
    cluster = asked.cluster
    if cluster.device.kind != "cuda" or needed <= cluster.device.usable_bytes:
        return
    for preset in sorted(PRESETS.values(), key=lambda p: p.device.usable_bytes):
        if preset.device.kind == "cuda" and preset.device.usable_bytes >= needed:
            try:
                there = ClusterSpec.preset(preset.name, gpus=cluster.devices)
            except AutoparError:  # so many do not fill its nodes
                continue
            words = f"{preset.name} with {bytes_text(there.device.usable_bytes)} to use"
            yield Attempt(words, {"cluster": preset.name}, there, None, None, asked.pin)


def resized(call: Any, before: int, after: int) -> Any:
    """A call with another batch: what has the old one in its first dim is cut, on no device."""
    import torch

    from autopar._torch_compat import pytree

    def cut(t: torch.Tensor) -> torch.Tensor:
        if not t.dim() or t.shape[0] != before:
            return t
        return torch.empty((after, *t.shape[1:]), dtype=t.dtype, device="meta")

    return pytree.tree_map_only(torch.Tensor, cut, call)
