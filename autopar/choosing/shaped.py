"""The best layout where a pin gives degrees for each stage: what is left to choose is little, all of it is priced."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from autopar.choosing.search import KEPT, LayoutChoice, rounded
from autopar.choosing.space import Space
from autopar.errors import Infeasible, LayoutError
from autopar.layouts import KEYS, Layout, parse_layout
from autopar.predicting.predict import Prediction, Predictor
from autopar.units import bytes_text


def choose_shaped(predictor: Predictor, pin: Mapping[str, Any], *, to_run: bool = False) -> LayoutChoice:
    """The fastest that fits; Infeasible where none does, LayoutError where the degrees cannot be."""
    began = time.perf_counter()
    named = parse_layout({key: value for key, value in pin.items() if key in KEYS}, predictor.cluster.devices)
    found, leanest, refused = list[Prediction](), list[Prediction](), list[LayoutError]()
    for layout in _layouts(predictor, pin, named, to_run=to_run):
        try:
            predictor.check(layout)
        except LayoutError as error:
            refused.append(error)
            continue
        made = predictor.price(layout)
        (found if made.fits else leanest).append(made)
    if not found:
        raise _why_not(predictor, pin, leanest, refused)
    best, *others = sorted(found, key=lambda one: (rounded(one.step_time_s), str(one.layout)))
    priced, solve_s = len(found) + len(leanest), time.perf_counter() - began
    return LayoutChoice(best, tuple(others[:KEPT]), best.step_time_s, named.devices, 1, 1, priced, solve_s)


def _layouts(predictor: Predictor, pin: Mapping[str, Any], named: Layout, *, to_run: bool) -> Iterator[Layout]:
    """All, from those that have the degrees of the stage with most data ranks everywhere."""
    alike = {key: value for key, value in pin.items() if key != "sp"}
    space = Space.of(predictor, {**alike, "dp": named.dp, "tp": named.tp, "cp": named.cp}, to_run=to_run)
    leaves = [leaf for group in space.groups() if not group.sp for leaf in space.leaves(group, named.pp, named.dp)]
    cut = [pin["sp"]] if "sp" in pin else [True, False]
    for sp, leaf, again, offload in product(cut, leaves, space.recomputations(), space.offloads):
        blocks = pin.get("recompute_blocks") if again == "full" else None
        yield replace(
            leaf, shapes=named.shapes, sp=sp, recompute=again, recompute_blocks=blocks, offload=offload
        )  # fmt: skip


def _why_not(
    predictor: Predictor, pin: Mapping[str, Any], leanest: list[Prediction], refused: list[LayoutError]
) -> Infeasible | LayoutError:
    if leanest:
        least = min(leanest, key=lambda one: one.peak_bytes)
        limit = predictor.limit_bytes
        return Infeasible(
            f"no layout with these degrees fits {bytes_text(limit)} per device: the leanest needs "
            f"{bytes_text(least.peak_bytes)} ({least.layout})",
            needed_bytes=least.peak_bytes,
            short_by_bytes=least.peak_bytes - limit,
            advice="use more devices, a smaller batch or sequence, or devices with more memory",
        )
    if refused:
        return refused[0]
    pinned = ", ".join(f"{key}={value}" for key, value in pin.items())
    return Infeasible(
        f"no layout goes with the pins {pinned} and a batch of {predictor.global_batch}: the batch must divide by the "
        "largest dp, and into micro-batches that the schedule allows; remove a pin or change the batch"
    )
