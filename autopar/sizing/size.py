"""`autopar.size`: how many GPUs a target takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autopar.cluster import ClusterSpec
from autopar.errors import ClusterSpecError
from autopar.precision import autocast_dtype, checked_precision
from autopar.predicting.predict import Prediction, Predictor
from autopar.sizing.explore import cheaper_by, explore, fewest_is_proven
from autopar.sizing.frontier import Clock, Frontier, device_s
from autopar.sizing.goal import Goal
from autopar.sizing.offer import MOST_GPUS, Offer, offers
from autopar.sizing.target import Target, parse_target
from autopar.sizing.types import ClusterSizing, Row, Sizing
from autopar.sizing.unreachable import refusal, why_not

TIME_LIMIT_S = 300.0


def size(
    model: nn.Module,
    target: str | Target,
    *,
    global_batch: int,
    clusters: Sequence[str | ClusterSpec] = (),
    max_gpus: int = MOST_GPUS,
    prices: Mapping[str, float] | None = None,
    inter_node_gbit_per_s: float | None = None,
    seq: int | None = None,
    example_inputs: Any = None,
    precision: str | None = None,
    optimizer: str = "adamw",
    memory_limit_bytes: int | None = None,
    pin: Mapping[str, Any] | None = None,
    time_limit_s: float = TIME_LIMIT_S,
    progress: Callable[[str], None] | None = None,
) -> Sizing:
    """The fewest GPUs that meet `target`, the cheapest way, and time against cost, on each of `clusters`.

    target: such as "1T tokens in 30 days", "300B tokens under $2M", "step in 2.5 s".
    global_batch: samples of a step. It is a decision about training and stays as it is given.
    clusters: presets, cluster files, or specs (taken as far as they go); every preset with a known price if left out.
    prices: USD per device-hour by the name of a cluster. pin: layout keys that are fixed, as in `autopar.plan`.
    time_limit_s: of the search; what is proven by then is said.
    Raises AutoparError for a target that is not understood, Infeasible for one that no cluster reaches.
    """
    wanted, precision = parse_target(target), checked_precision(precision)
    offered = offers(
        clusters,
        dtype=_compute_dtype(model, precision),
        max_gpus=max_gpus,
        prices=prices,
        inter_node_gbit_per_s=inter_node_gbit_per_s,
    )
    _check_prices(wanted, offered)
    began = time.perf_counter()
    base = Predictor(
        model, offered[0].whole, example_inputs=example_inputs, seq=seq, global_batch=global_batch,
        precision=precision, optimizer=optimizer, memory_limit_bytes=memory_limit_bytes,
    )  # fmt: skip
    tokens = base.table.tokens if base.table.samples_are_tokens else None
    goal = Goal.of(wanted, global_batch=global_batch, tokens=tokens)
    trace_s, began = time.perf_counter() - began, time.perf_counter()
    frontiers: list[Frontier] = []
    complete = True
    for done, offer in enumerate(offered):
        predictor = base if not done else base.elsewhere(offer.whole, memory_limit_bytes)
        left_s = began + time_limit_s - time.perf_counter()
        clock = Clock(time.perf_counter() + max(0.0, left_s) / (len(offered) - done))
        frontiers.append(Frontier(predictor, offer, goal, dict(pin or {}), clock))
        complete = explore(frontiers[-1], progress) and complete
    sized = tuple(map(_sized, frontiers))
    if not any(one.rows for one in sized):
        raise refusal(frontiers, sized, Clock(began + time_limit_s), complete=complete)
    return Sizing(goal, global_batch, max_gpus, sized, complete, trace_s, time.perf_counter() - began)


def _check_prices(target: Target, offered: Sequence[Offer]) -> None:
    for offer in offered:
        if target.budget_usd is not None and offer.price_per_hour_usd is None:
            raise ClusterSpecError(
                f"target {target.text!r} has a budget, but the price of {offer.name} is not known; give it: "
                f"--price {offer.name}=USD (per device-hour), or leave the cluster out"
            )


def _compute_dtype(model: nn.Module, precision: str) -> str:
    """Of the model's products."""
    found = autocast_dtype(precision) or next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return str(found or torch.float32).removeprefix("torch.")


def _sized(frontier: Frontier) -> ClusterSizing:
    rows = tuple(_row(frontier, best) for best in frontier.meeting())
    closest = None if rows else frontier.closest()
    return ClusterSizing(
        name=frontier.offer.name,
        price_per_hour_usd=frontier.offer.price_per_hour_usd,
        rows=rows,
        closest=_row(frontier, closest) if closest else None,
        why="" if rows else why_not(frontier),
        fewest_proven=fewest_is_proven(frontier),
        cheaper_by=cheaper_by(frontier),
        searches=frontier.searches,
        sizes=frontier.offer.sizes,
    )


def _row(frontier: Frontier, best: Prediction) -> Row:
    goal, gpus = frontier.goal, best.layout.devices
    return Row(
        cluster=frontier.offer.name,
        gpus=gpus,
        layout=best.layout,
        step_time_s=best.step_time_s,
        per_s=goal.per_step / best.step_time_s,
        mfu=best.mfu,
        peak_bytes=best.peak_bytes,
        run_s=goal.steps * best.step_time_s,
        usd=frontier.usd(device_s(best)),
        device_s=device_s(best),
    )
