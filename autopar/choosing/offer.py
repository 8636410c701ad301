"""Whether a plan by degrees is to be offered for what a caller asks, and the best one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from autopar.asked import Call
from autopar.choosing.free_fixes import DEFAULT_TIME_S, explained
from autopar.choosing.plan import STAGED_KEYS, choose, is_staged, staged_plan, wish
from autopar.cluster import ClusterSpec
from autopar.errors import Infeasible, LayoutError
from autopar.plans import PlanOptions
from autopar.predicting.predict import Predictor, call_to_sample, global_batch_of
from autopar.stage_shapes import is_shaped
from autopar.staged import StagedPlan
from autopar.trace import Sample, Trace, trace, trace_and_sample


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


def trace_for_both(model: nn.Module, call: Call, precision: str) -> tuple[Trace, Sample | None]:
    """The trace for a plan op by op, and where it costs nothing the sample for a plan by degrees."""
    try:
        _, other = call_to_sample(model, call)
    except LayoutError:
        return trace(model, call, precision=precision), None
    return trace_and_sample(model, call, other, precision=precision)


@dataclass(frozen=True)
class Terms:
    """What a layout is asked for, beside the model, its inputs and the cluster: options as of `plan`.

    to_run: only layouts that run today, on all devices. anyway: also where there would be no need for stages.
    """

    precision: str
    optimizer: str
    memory_limit_bytes: int | None
    pin: Mapping[str, Any] | None
    time_limit_s: float
    to_run: bool = False
    anyway: bool = False


def best_layout(
    model: nn.Module,
    cluster: ClusterSpec,
    call: Call,
    terms: Terms,
    progress: Callable[[str], None] | None = None,
    sample: Sample | None = None,
) -> StagedPlan | None:
    """The best layout, if it has stages, context ranks or micro-batches; None where a plan op by op is to be made.

    sample: of `trace_for_both`, if there is one.
    """
    limits: dict[str, Any] = {"optimizer": terms.optimizer, "memory_limit_bytes": terms.memory_limit_bytes}
    try:
        batch = global_batch_of(call)
        asked = wish(terms.pin, cluster, model, batch, terms.optimizer)
        if asked.apart and not terms.anyway:
            return None
        began = time.perf_counter()
        given: dict[str, Any] = {"example_inputs": call, "precision": terms.precision, "sample": sample, **limits}
        predictor = Predictor(model, cluster, global_batch=batch, as_written=False, **given)
    except LayoutError:
        if any(key in (terms.pin or {}) for key in STAGED_KEYS):
            raise
        return None  # what `predict` does not know is planned op by op
    trace_s = time.perf_counter() - began
    try:
        choice = choose(predictor, asked.pin, terms.time_limit_s, progress, to_run=terms.to_run)
    except Infeasible as error:
        if terms.anyway or (error.needed_bytes is None and not asked.wanted):
            return None  # there is no such layout, whatever the memory
        if is_shaped(asked.pin):
            raise  # what else would fit is known of stages that are alike
        raise explained(error, predictor, asked.pin, min(DEFAULT_TIME_S, terms.time_limit_s)) from None
    if not (asked.wanted or is_staged(choice, batch)):
        return None
    limit = predictor.limit_bytes
    pins = {key: list(value) if isinstance(value, tuple) else value for key, value in asked.pin.items()}
    options = PlanOptions(batch, terms.precision, terms.optimizer, limit, pins)
    return staged_plan(predictor, choice, options).with_timings(trace_s=trace_s)
