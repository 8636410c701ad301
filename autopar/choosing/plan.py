"""From a model and a cluster to a plan by degrees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopar.choosing.search import LayoutChoice, LayoutSearch, rounded
from autopar.choosing.shaped import choose_shaped
from autopar.choosing.space import LAYOUT_KEYS, Space
from autopar.cluster import ClusterSpec
from autopar.cost.optimizer import OptimizerSpec
from autopar.errors import PinError, PlanMismatch
from autopar.experts import ExpertSide
from autopar.pin_mesh import ranks
from autopar.placements import Placement, State
from autopar.plan_types import Decisions
from autopar.plans import Candidate, InputShape, PlanOptions
from autopar.predicting.predict import Prediction, Predictor
from autopar.sample import sample_call
from autopar.stage_shapes import is_shaped
from autopar.stage_shapes import several as several_degrees
from autopar.staged import OtherLayout, StagedPlan, experts_on_context, stage_axes
from autopar.trace import ParamInfo, graph_hash

STAGED_KEYS = ("pp", "cp", "vpp", "schedule", "offload", "cut", "micro_batch")  # cp: where it takes several nodes
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Wish:
    """What is asked of a search over layouts.

    wanted: the user pinned what only such a search can give. apart: why no such search is made; "" if it is.
    """

    pin: Mapping[str, Any]
    wanted: bool
    apart: str = ""


def wish(
    pin: Mapping[str, Any] | None, cluster: ClusterSpec, model: nn.Module, global_batch: int, optimizer: str
) -> Wish:
    """Whether layouts with pipeline and context ranks are to be looked at.

    They are wherever one of their degrees is pinned. Where none is, they are on clusters of several nodes if a node
    cannot hold the model's training state, or if there are fewer samples than devices: otherwise data parallelism
    across nodes and tensor parallelism inside them keep all devices busy, and a plan op by op decides more. PinError
    for pins that go with neither kind of plan.
    """
    given = dict(pin or {})
    usual = {"micro_batch": (None,)}  # pinned to one sample, it says something
    asked = [key for key in STAGED_KEYS if given.get(key) not in usual.get(key, (1, "none", None))]
    if asked == ["cp"] and (cluster.nodes == 1 or given.get("pp") == 1):
        return Wish(given, wanted=False, apart="pinned")  # a plan op by op has context ranks, too
    wanted = bool(asked)
    foreign = [key for key in given if key not in LAYOUT_KEYS]
    if wanted and foreign:
        degrees = ", ".join(key for key in STAGED_KEYS if key in given)
        raise PinError(
            f"pin {foreign[0]!r} does not go with {degrees}: stages and micro-batches are laid out by degrees, not op "
            "by op; leave one of them out"
        )
    several = [key for key in ("dp", "tp", "cp") if several_degrees(given.get(key)) is not None]
    if wanted and several and given.get("pp", 1) == 1:
        raise PinError(
            f"pin {several[0]}={given[several[0]]}: micro-batches take one axis a degree; give the number of ranks, or "
            "pin pp and give a number for each stage"
        )
    if wanted:
        return Wish(given, wanted=True)
    pinned = [ranks(given[key]) for key in ("dp", "tp") if key in given]
    all_used = math.prod(d for d in pinned if d is not None) == cluster.devices
    by_experts = given.get("ep", 1) != 1  # which a layout by degrees does not spread
    if given.get("pp") == 1 or foreign or all_used or several or by_experts:
        return Wish(given, wanted=False, apart="pinned")
    node_bytes = cluster.devices_per_node * cluster.device.usable_bytes
    if cluster.nodes == 1 or (_state_bytes(model, optimizer) <= node_bytes and global_batch >= cluster.devices):
        return Wish(given, wanted=False, apart="no need")
    return Wish(given, wanted=False)


def _state_bytes(model: nn.Module, optimizer: str) -> int:
    """Parameters, their gradients in float32, and the optimizer's state with its master copy."""
    states = OptimizerSpec(optimizer).states_per_param
    found = 0
    for param in model.parameters():
        size = param.dtype.itemsize
        found += param.numel() * (size + 4 + 4 * states + (4 if size < 4 and states else 0))
    return found


def choose(
    predictor: Predictor,
    pin: Mapping[str, Any],
    time_limit_s: float,
    progress: Progress | None = None,
    *,
    to_run: bool = False,
) -> LayoutChoice:
    """The fastest layout under a pin; raises Infeasible, PinError, LayoutError. to_run: of those that run today."""
    if pin.get("pp", 1) != 1 and is_shaped(pin):
        return choose_shaped(predictor, pin, to_run=to_run)
    return LayoutSearch(predictor, Space.of(predictor, pin, to_run=to_run), progress=progress).run(time_limit_s)


def is_staged(choice: LayoutChoice, global_batch: int) -> bool:
    """Whether the best layout has what only a plan by degrees can have."""
    layout = choice.best.layout
    by_degrees = layout.pp > 1 or layout.cp > 1 or layout.offload != "none"
    return by_degrees or layout.micro_batches(global_batch) > 1


def staged_plan(predictor: Predictor, choice: LayoutChoice, options: PlanOptions) -> StagedPlan:
    """The plan that a choice comes to."""
    best, layout = choice.best, choice.best.layout
    mesh, roles = stage_axes(layout)
    figures = _rounded({key: value for key, value in best.to_dict().items() if key != "layout"})
    for rate in ("tokens_per_s_per_gpu", "mfu", "hfu"):  # idle devices count
        figures[rate] = rounded(figures[rate] * choice.devices / predictor.cluster.devices)
    return StagedPlan(
        graph_hash=graph_hash(predictor.sample.trace),
        torch_version=torch.__version__.split("+")[0],
        cluster=predictor.cluster,
        mesh=mesh,
        roles=roles,
        options=options,
        inputs=_inputs(predictor),
        decisions=Decisions({}, _parameters(predictor, best), {}, frozenset(), frozenset()),
        layout_keys=layout.to_dict(),
        predicted=figures,
        status="optimal" if choice.gap == 0 else "feasible",
        objective_s=rounded(best.step_time_s),
        bound_s=rounded(choice.bound_s),
        gap=rounded(choice.gap),
        candidates=tuple(
            Candidate((p.layout.pp, p.layout.dp, p.layout.cp, p.layout.tp), "feasible", rounded(p.step_time_s), None)
            for p in (best, *choice.alternatives)
        ),
        timings={"solve_s": choice.solve_s},
        blocks=tuple(best.breakdown["blocks_per_stage"]),
        others=tuple(
            OtherLayout(p.layout.to_dict(), rounded(p.step_time_s), p.peak_bytes) for p in choice.alternatives
        ),
        counts={"cells": choice.cells, "visited": choice.visited, "priced": choice.priced},
        predictor=predictor,
    )


def _rounded(data: dict[str, Any]) -> dict[str, Any]:
    """Its figures, as every processor would have them."""
    kept: dict[str, Any] = {}
    for key, value in data.items():
        kept[key] = (
            rounded(value) if isinstance(value, float) else _rounded(value) if isinstance(value, dict) else value
        )
    return kept


def _inputs(predictor: Predictor) -> tuple[InputShape, ...]:
    """Of the global batch."""
    found = []
    for one in predictor.sample.trace.inputs:
        shape = list(one.shape)
        if one.batch_dim is not None:
            shape[one.batch_dim] = predictor.global_batch
        found.append(InputShape(one.path, tuple(shape), str(one.dtype).removeprefix("torch.")))
    return tuple(found)


def _parameters(predictor: Predictor, best: Prediction) -> dict[str, State]:
    """How every parameter of the traced layers is stored over the ranks of its stage."""
    if best.layout.shapes is not None:
        return {}  # that depends on the stage, of which the traced layers are examples
    mesh, roles = stage_axes(best.layout)
    trace, cut = predictor.sample.trace, "S(0)" if best.layout.zero == 3 else "R"
    experts = ExpertSide.of(trace).values
    expert_role = "cp" if experts_on_context(best.layout) else "ep"

    def stored(param: ParamInfo, size: int, role: str) -> Placement:
        if size == 1:
            return "R"
        if role == "tp":
            return predictor.axis.params.get(param.fqn, "R")
        return "S(0)" if role == expert_role and param.node in experts else cut

    return {p.fqn: tuple(stored(p, size, role) for size, role in zip(mesh, roles, strict=True)) for p in trace.params}


def reopen(plan: StagedPlan, model: nn.Module, example_inputs: Any = None) -> Predictor:
    """What it takes to choose again for a loaded plan; raises PlanMismatch if it was made for another model."""
    options = plan.options
    predictor = Predictor(
        model,
        plan.cluster,
        example_inputs=example_inputs or sample_call(plan),
        global_batch=options.global_batch,
        precision=options.precision,
        optimizer=options.optimizer,
        memory_limit_bytes=options.memory_limit_bytes,
        as_written=False,
    )
    if graph_hash(predictor.sample.trace) != plan.graph_hash:
        raise PlanMismatch("the plan was made for another model (its traced graph differs); plan again for this model")
    return predictor
