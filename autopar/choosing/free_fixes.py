"""What to change where no layout fits: another value of a pin, more nodes, another batch, more memory; each proven.

Whether anything fits after a change is asked of the leanest layout; the fastest that fits is then searched for. More
nodes never make the leanest layout worse, as nodes may stay idle, so the fewest are found by bisection.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autopar.choosing.fixes import (
    MOST_NODES,
    grown,
    memory_words,
    more_devices,
    moved,
    other_devices,
    shorter,
    with_batch,
    with_limit,
)
from autopar.choosing.search import LayoutSearch
from autopar.choosing.space import Space, divisors, powers_of_two
from autopar.errors import AutoparError, Infeasible
from autopar.fixes import Fix, in_order
from autopar.layouts import OFFLOAD, RECOMPUTE, SCHEDULES
from autopar.predicting.predict import Predictor
from autopar.units import bytes_text

DEFAULT_TIME_S = 5.0  # for all of them


@dataclass(frozen=True)
class Change:
    """One change and the search that it gives."""

    what: str
    change: Mapping[str, Any]
    predictor: Predictor
    pin: Mapping[str, Any]

    def search(self) -> LayoutSearch:
        """Over all layouts after the change."""
        return LayoutSearch(self.predictor, Space.of(self.predictor, self.pin))

    def helps(self) -> bool:
        """Whether any layout then fits."""
        limit = self.predictor.limit_bytes
        try:
            leanest = self.search().leanest(limit)
        except AutoparError:  # a value that goes with no layout
            return False
        return leanest is not None and leanest[1].total <= limit

    def fix(self, time_limit_s: float) -> Fix:
        """With the fastest layout found in the time."""
        search, of = self.search(), self.predictor
        try:
            best = search.run(time_limit_s).best
        except Infeasible:  # no time: that one of them fits is known
            leanest = search.leanest(of.limit_bytes)
            assert leanest is not None
            best = of.on(of.cluster.part(leanest[0].devices)).price(leanest[0])
        layout = best.layout.to_dict()
        return Fix(self.what, self.change, layout, of.cluster.devices, best.step_time_s, best.peak_bytes)


def explained(
    error: Infeasible, predictor: Predictor, pin: Mapping[str, Any], time_limit_s: float = DEFAULT_TIME_S
) -> Infeasible:
    """The answer of a search in which no layout fits, with what would help; others as they are."""
    if error.short_by_bytes is None:
        return error
    return error.with_fixes(search_fixes(predictor, pin, error.needed_bytes or 0, time_limit_s))


def search_fixes(
    predictor: Predictor, pin: Mapping[str, Any], needed_bytes: int, time_limit_s: float = DEFAULT_TIME_S
) -> tuple[Fix, ...]:
    """The smallest single changes after each of which some layout fits, the cheapest first.

    needed_bytes: by the leanest layout as things are. Kinds of change for which there is no time are left out.
    """
    deadline = time.perf_counter() + time_limit_s
    found = []
    for change in _changes(predictor, dict(pin), needed_bytes, deadline):
        left = deadline - time.perf_counter()
        if left <= 0:
            break
        found.append(change.fix(left / 2))
    return in_order(found)


def _changes(predictor: Predictor, pin: dict[str, Any], needed: int, deadline: float) -> Iterator[Change]:
    limit = {"memory_limit_bytes": needed}
    yield Change(memory_words(predictor.cluster, needed), limit, with_limit(predictor, needed), pin)
    rows = [_nodes(predictor, pin, deadline)]
    rows += [_other_values(predictor, pin, key) for key in pin]
    rows += [_batches(predictor, pin), _sequences(predictor, pin), _devices(predictor, pin, needed)]
    for row in rows:
        for change in row:
            if time.perf_counter() > deadline:
                return
            if change.helps():
                yield change
                break


def _nodes(predictor: Predictor, pin: dict[str, Any], deadline: float) -> Iterator[Change]:
    """The fewest more nodes that help, if any do."""

    def asked(nodes: int) -> Change | None:
        cluster = grown(predictor.cluster, nodes * predictor.cluster.devices_per_node)
        if cluster is None:
            return None
        change, words = more_devices(predictor.cluster, cluster)
        return Change(words, change, moved(predictor, cluster), pin)

    low = predictor.cluster.nodes  # does not help
    high, best = 2 * low, asked(2 * low)
    while best is not None and not best.helps():
        if high >= MOST_NODES * predictor.cluster.nodes or time.perf_counter() > deadline:
            return
        low, high, best = high, 2 * high, asked(2 * high)
    while best is not None and high - low > 1:
        middle = asked((low + high) // 2)
        if time.perf_counter() > deadline:
            return
        if middle is not None and middle.helps():
            high, best = (low + high) // 2, middle
        else:
            low = (low + high) // 2
    if best is not None:
        yield best


def _other_values(predictor: Predictor, pin: dict[str, Any], key: str) -> Iterator[Change]:
    """Other values of one pin, the nearest first."""
    pinned, values = pin[key], _values(predictor, key)
    if pinned not in values:
        return

    def distance(value: Any) -> float:
        degree = key not in ("zero", "recompute", "schedule", "sp", "offload")
        return abs(math.log(value / pinned)) if degree else abs(values.index(value) - values.index(pinned))

    for value in sorted((v for v in values if v != pinned), key=distance):
        yield Change(f"{key}={_word(value)} instead of {_word(pinned)}", {key: value}, predictor, {**pin, key: value})


def _values(predictor: Predictor, key: str) -> list[Any]:
    """What a key may be pinned to, in its order."""
    blocks, batch = list(range(1, max(1, predictor.table.blocks) + 1)), divisors(predictor.global_batch)
    inside = powers_of_two(predictor.cluster.devices_per_node)
    known: dict[str, list[Any]] = {
        "dp": batch, "micro_batch": batch, "pp": blocks, "vpp": blocks, "recompute_blocks": blocks,
        "tp": inside if predictor.heads is None else divisors(predictor.heads),
        "cp": powers_of_two(predictor.cluster.devices), "zero": [0, 1, 2, 3], "sp": [False, True],
        "ep": divisors(predictor.table.experts) if predictor.table.experts else [1],
        "recompute": list(RECOMPUTE), "schedule": list(SCHEDULES), "offload": list(OFFLOAD),
    }  # fmt: skip
    return known.get(key, [])


def _batches(predictor: Predictor, pin: dict[str, Any]) -> Iterator[Change]:
    """Smaller batches, the largest first: they help where micro-batches in flight are what is too much."""
    for batch in reversed(divisors(predictor.global_batch)[:-1]):
        what = f"a global batch of {batch} instead of {predictor.global_batch}"
        yield Change(what, {"global_batch": batch}, with_batch(predictor, batch), pin)


def _sequences(predictor: Predictor, pin: dict[str, Any]) -> Iterator[Change]:
    """Shorter ones, the longest first."""
    for _, there in shorter(predictor):
        what = f"sequences of {there.table.tokens} tokens instead of {predictor.table.tokens}"
        yield Change(what, {"seq": there.table.tokens}, there, pin)


def _devices(predictor: Predictor, pin: dict[str, Any], needed: int) -> Iterator[Change]:
    """Presets with more memory, the least first."""
    for name, cluster in other_devices(predictor, needed):
        there = moved(predictor, cluster)
        there.limit_bytes = cluster.device.usable_bytes
        yield Change(f"{name} with {bytes_text(there.limit_bytes)} to use", {"cluster": name}, there, pin)


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
