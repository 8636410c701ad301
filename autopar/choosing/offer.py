"""Whether a plan by degrees is to be offered for what a caller asks, and the best one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from autopar.asked import Call
from autopar.choosing.free_fixes import DEFAULT_TIME_S, explained
from autopar.choosing.plan import STAGED_KEYS, choose, is_staged, staged_plan, wish
from autopar.cluster import ClusterSpec
from autopar.errors import Infeasible, LayoutError
from autopar.plans import PlanOptions
from autopar.predicting.predict import Predictor, global_batch_of
from autopar.staged import StagedPlan


def may_be_staged(
    model: nn.Module, cluster: ClusterSpec, call: Call, optimizer: str, pin: Mapping[str, Any] | None
) -> bool:
    """Whether `best_layout` would look at layouts with stages: quickly known, and the same on every rank."""
    if cluster.devices == 1:
        return False
    try:
        return not wish(pin, cluster, model, global_batch_of(call), optimizer).apart
    except LayoutError:
        return any(key in (pin or {}) for key in STAGED_KEYS)


def best_layout(
    model: nn.Module,
    cluster: ClusterSpec,
    call: Call,
    precision: str,
    limits: Mapping[str, Any],
    pin: Mapping[str, Any] | None,
    time_limit_s: float,
    progress: Callable[[str], None] | None,
    to_run: bool = False,
    anyway: bool = False,
) -> StagedPlan | None:
    """The best layout, if it has stages, context ranks or micro-batches; None where a plan op by op is to be made.

    to_run: only of layouts that run today, on all devices. anyway: also where there would be no need for stages.
    """
    try:
        batch = global_batch_of(call)
        asked = wish(pin, cluster, model, batch, limits["optimizer"])
        if asked.apart and not anyway:
            return None
        began = time.perf_counter()
        predictor = Predictor(model, cluster, example_inputs=call, global_batch=batch, precision=precision, **limits)
    except LayoutError:
        if any(key in (pin or {}) for key in STAGED_KEYS):
            raise
        return None  # what `predict` does not know is planned op by op
    trace_s = time.perf_counter() - began
    try:
        choice = choose(predictor, asked.pin, time_limit_s, progress, to_run=to_run)
    except Infeasible as error:
        if anyway or (error.needed_bytes is None and not asked.wanted):
            return None  # there is no such layout, whatever the memory
        raise explained(error, predictor, asked.pin, min(DEFAULT_TIME_S, time_limit_s)) from None
    if not (asked.wanted or is_staged(choice, batch)):
        return None
    limit, pins = predictor.limit_bytes, dict(asked.pin)
    options = PlanOptions(batch, precision, str(limits["optimizer"]), limit, pins)
    return staged_plan(predictor, choice, options).with_timings(trace_s=trace_s)
