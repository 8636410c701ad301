"""The face: plan, compile, verify. Each reads like the pipeline it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from autopar.asked import check_options, default_call, plan_options
from autopar.choosing.crowded import crowded
from autopar.choosing.offer import Terms, best_layout, may_be_staged, trace_for_both
from autopar.choosing.op_fixes import Answer, Attempt, Question, explained, resized
from autopar.cluster import ClusterSpec
from autopar.codegen.dump import dump_stages
from autopar.codegen.schedule import emit_within, memory_estimate, persistent_memory
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.drawing import random_nodes
from autopar.errors import AutoparError, Infeasible, PlanMismatch
from autopar.explain import Report
from autopar.explaining.workbench import Workbench
from autopar.figures import predicted_figures
from autopar.layout import axis_roles, layout_keys
from autopar.memory_types import MemoryEstimate
from autopar.mesh_search import DEFAULT_TIME_LIMIT_S, SearchSettings
from autopar.pins_by_stage import StageRoles
from autopar.placements import State
from autopar.plan_check import check_decisions
from autopar.plan_types import Decisions
from autopar.planning import SearchResult, search
from autopar.plans import InputShape, Plan, PlanOptions
from autopar.precision import MODEL
from autopar.runtime.execute import RankProgram
from autopar.runtime.make_stages import make_stages
from autopar.runtime.memory import check_room
from autopar.runtime.program import Call, Compiled, Program
from autopar.runtime.staged import CompiledStages
from autopar.runtime.world import agree, check_same_random_state, device_mesh, join_world
from autopar.sample import sample_call
from autopar.solver import NothingCheaper
from autopar.staged import StagedPlan
from autopar.staging import check_runnable, stage_mesh
from autopar.trace import Trace, graph_hash, trace
from autopar.verification import VerifyReport, emit_for
from autopar.verification import verify as verify_ops
from autopar.verifying.staged import verify_staged

__all__ = ["Plan", "Program", "Report", "VerifyReport", "compile", "plan", "verify"]


def plan(
    model: nn.Module,
    cluster: ClusterSpec,
    *,
    example_inputs: Call | None = None,
    seq: int | None = None,
    global_batch: int | None = None,
    precision: str | None = None,
    optimizer: str = "adamw",
    memory_limit_bytes: int | None = None,
    objective: str = "throughput",
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    pin: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
    dump_dir: str | Path | None = None,
) -> Plan:
    """Find the fastest plan for `model` on `cluster`. Needs no GPU, no process group and no weights.

    example_inputs: (args, kwargs) of the global batch, real, meta or fake tensors; for a transformers
        model `seq` and `global_batch` will do.
    precision: "model" (the model's own dtypes), "fp32", or "bf16": bfloat16 products as under autocast, with
        parameters, optimizer state and sums of gradients in float32; see `autopar.precision`.
    memory_limit_bytes: per device; the device's memory less its reserve if not given.
    time_limit_s: of the search (about); the best plan by then is returned with its proven gap.
    pin: what is fixed, see `autopar.pins`.
    dump_dir: a folder for every stage as readable Python or JSON, see `docs/explain.md`.
    Where pp, cp, vpp, a schedule or a micro-batch is pinned, and on several nodes for models that one of them cannot
    hold, batches of fewer samples than devices, or of more than fit at once, layouts with pipeline ranks, context
    ranks and micro-batches are looked at too: if one of them is the fastest, the plan is a `StagedPlan`, which
    `Program.train_step` runs. Pin pp=1 for a plan op by op of the whole batch.
    Raises TraceError, Infeasible, PinError, ClusterSpecError.
    """
    precision = check_options(precision, objective)
    call = example_inputs or default_call(model, global_batch, seq)
    began = time.perf_counter()
    terms = Terms(precision, optimizer, memory_limit_bytes, pin, time_limit_s)
    staged = best_layout(model, cluster, call, terms, progress)
    if staged is not None:
        _no_dump(dump_dir)
        return staged
    rival, free = None, not pin and dump_dir is None and cluster.nodes > 1
    traced, sample = trace_for_both(model, call, precision) if free else (_traced(model, call, precision), None)
    trace_s = time.perf_counter() - began
    options = plan_options(traced, cluster, global_batch, precision, optimizer, memory_limit_bytes, pin)
    if free and crowded(traced, cluster, options.memory_limit_bytes):
        rival = best_layout(model, cluster, call, replace(terms, anyway=True), progress, sample)
    if rival is not None:
        return _faster(rival, traced, time_limit_s, progress)
    try:
        made = _plan_trace(traced, cluster, options, time_limit_s=time_limit_s, progress=progress)
    except Infeasible as error:
        spent_s = time.perf_counter() - began
        asked = Question(cluster, options.global_batch, pin or {}, memory_limit_bytes, spent_s)
        raise explained(error, asked, _again(model, call, options), time_limit_s) from None
    if dump_dir is not None:
        dump_stages(dump_dir, traced, made, emit_for(traced, made))
    return made.with_timings(trace_s=trace_s)


def compile(
    model: nn.Module,
    cluster: ClusterSpec,
    *,
    plan: Plan | None = None,
    example_inputs: Call | None = None,
    seq: int | None = None,
    global_batch: int | None = None,
    precision: str | None = None,
    optimizer: str = "adamw",
    memory_limit_bytes: int | None = None,
    objective: str = "throughput",
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    pin: Mapping[str, Any] | None = None,
    inputs: str = "global",
    dump_dir: str | Path | None = None,
) -> Program:
    """An ordinary nn.Module that runs `model` in parallel on the ranks that torchrun started.

    Plans at its first call, on the real batch, or at once with `example_inputs` (or `seq`); with `plan` it
    runs that plan. Options as in `plan`; rank 0 writes `dump_dir`. Raises RuntimeFailure outside torchrun,
    PlanMismatch where world size, model or batch differ from the plan's.
    """
    chosen = check_options(precision if plan is None else precision or plan.options.precision, objective)
    if plan is not None and chosen != plan.options.precision:
        raise PlanMismatch(f"the plan is for precision={plan.options.precision!r}, not {chosen!r}; plan again")
    if inputs != "global":
        raise AutoparError(f"inputs={inputs!r} is not available yet; pass the global batch on every rank")
    if isinstance(plan, StagedPlan):
        check_runnable(plan)
    if plan is not None and plan.devices != cluster.devices:
        raise PlanMismatch(f"the plan is for {plan.devices} devices, the cluster has {cluster.devices}; plan again")
    join_world(cluster.devices, cluster.device.kind)

    planner = _Planner(
        cluster, plan, chosen, global_batch, optimizer, memory_limit_bytes, time_limit_s, pin or {}, dump_dir
    )
    at_once = example_inputs or (default_call(model, global_batch, seq) if seq is not None else None)
    world = device_mesh(cluster.device.kind, (cluster.devices,)) if cluster.devices > 1 else None
    planner.program = program = Program(model, planner, world)
    if at_once is not None:
        program.prepare(at_once)
    return program


def verify(model: nn.Module, plan: Plan, *, example_inputs: Call | None = None, seed: int = 0) -> VerifyReport:
    """Prove that the program of `plan` equals `model`; raises VerifyError naming the first node that differs.

    example_inputs: (args, kwargs) to compare on; made up from the plan's shapes if not given.
    """
    if not isinstance(plan, StagedPlan):
        return verify_ops(model, plan, example_inputs=example_inputs, seed=seed)
    precision = plan.options.precision
    return verify_staged(model, plan, example_inputs, seed, lambda one: _traced(model, one, precision), _plan_trace)


@dataclass
class _Planner:
    """What a program asks for a plan of its call: the plan that was given, or one made by rank 0. Options as `compile`.

    program: who asks.
    """

    cluster: ClusterSpec
    plan: Plan | None
    precision: str
    global_batch: int | None
    optimizer: str
    memory_limit_bytes: int | None
    time_limit_s: float
    pin: Mapping[str, Any]
    dump_dir: str | Path | None
    program: Program | None = None

    def __call__(self, model: nn.Module, call: Call, fixed: Mapping[str, State] | None) -> Compiled | CompiledStages:
        """fixed: placements that parameters have already."""
        assert self.program is not None
        known = self.plan if fixed is None else self.program.plan
        if isinstance(known, StagedPlan):
            return self._stages(model, call, known, fixed)
        if known is None and may_be_staged(model, self.cluster, call, self.optimizer, self.pin):
            text = agree(lambda: self._staged(model, call), self.cluster.device.kind)
            if text:
                return self._stages(model, call, cast(StagedPlan, Plan.loads(text)), None)
        traced, dump_to = _traced(model, call, self.precision), self.program.dump_folder(self.dump_dir)
        if self.plan is not None and fixed is None:
            return _ready(traced, _matching(self.plan, traced), self.cluster, dump_to)

        def make() -> str:
            mesh = known.mesh if fixed is not None and known is not None else None
            options = plan_options(
                traced, self.cluster, self.global_batch, self.precision, self.optimizer, self.memory_limit_bytes,
                self.pin,
            )  # fmt: skip
            return _plan_trace(
                traced, self.cluster, options, time_limit_s=self.time_limit_s, fixed=fixed, fixed_mesh=mesh
            ).dumps()

        text = make() if self.cluster.devices == 1 else agree(make, self.cluster.device.kind)
        return _ready(traced, _matching(Plan.loads(text), traced), self.cluster, dump_to)

    def _staged(self, model: nn.Module, call: Call) -> str:
        limit, seconds = self.memory_limit_bytes, self.time_limit_s
        terms = Terms(self.precision, self.optimizer, limit, self.pin, seconds, to_run=True)
        made = best_layout(model, self.cluster, call, terms)
        return "" if made is None else made.dumps()

    def _stages(
        self, model: nn.Module, call: Call, staged: StagedPlan, fixed: Mapping[str, State] | None
    ) -> CompiledStages:
        _no_dump(self.dump_dir)

        def plan_ops(traced: Trace, part: ClusterSpec, options: PlanOptions, stages: StageRoles | None) -> Plan:
            held: dict[str, Any] = {} if fixed is None else {"fixed": fixed, "fixed_mesh": stage_mesh(staged)}
            return _plan_trace(traced, part, options, time_limit_s=self.time_limit_s, stages=stages, **held)

        return make_stages(model, call, staged, lambda one: _traced(model, one, self.precision), plan_ops)


def _faster(
    rival: StagedPlan, traced: Trace, time_limit_s: float, progress: Callable[[str], None] | None
) -> Plan | StagedPlan:
    """A plan op by op if there is one with shorter steps than the rival's, else the rival, with what is proven of
    both kinds."""
    try:
        return _plan_trace(
            traced, rival.cluster, rival.options, time_limit_s=time_limit_s, progress=progress,
            faster_than_s=rival.objective_s,
        )  # fmt: skip
    except NothingCheaper as none:
        bound_s = min(rival.bound_s, none.bound_s)
        gap = max(0.0, 1 - bound_s / rival.objective_s)
        return replace(rival, bound_s=bound_s, gap=gap, status="feasible" if gap else "optimal")


def _no_dump(dump_dir: str | Path | None) -> None:
    if dump_dir is not None:
        raise AutoparError("dump_dir shows the steps of a plan op by op; this one is by degrees: pin pp=1, cp=1")


def _again(model: nn.Module, call: Call, options: PlanOptions) -> Answer:
    """What `plan` says after a change."""

    def answer(changed: Attempt, time_limit_s: float) -> Plan:
        there = call if changed.batch is None else resized(call, options.global_batch, changed.batch)
        terms = Terms(options.precision, options.optimizer, changed.limit_bytes, changed.pin, time_limit_s)
        staged = best_layout(model, changed.cluster, there, terms)
        if staged is not None:
            return staged
        traced = _traced(model, there, options.precision)
        wanted = plan_options(
            traced, changed.cluster, None, options.precision, options.optimizer, changed.limit_bytes, changed.pin
        )
        return _plan_trace(traced, changed.cluster, wanted, time_limit_s=time_limit_s)

    return answer


# -- the pipeline -----------------------------------------------------------------------


def _plan_trace(
    traced: Trace,
    cluster: ClusterSpec,
    options: PlanOptions,
    *,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    fixed: Mapping[str, State] | None = None,
    fixed_mesh: tuple[int, ...] | None = None,
    progress: Callable[[str], None] | None = None,
    faster_than_s: float = float("inf"),
    stages: StageRoles | None = None,
) -> Plan:
    settings = replace(
        _settings(traced, cluster, options),
        time_limit_s=time_limit_s,
        fixed_params=fixed,
        fixed_mesh=fixed_mesh,
        progress=progress,
        faster_than_s=faster_than_s,
        stages=stages,
    )
    found = search(traced, settings)
    made = _as_plan(traced, cluster, options, found).with_timings(solve_s=found.solve_s)
    return replace(made, bench=_workbench(traced, cluster))


def _settings(traced: Trace, cluster: ClusterSpec, options: PlanOptions) -> SearchSettings:
    spec = OptimizerSpec(options.optimizer)

    def memory_of(decisions: Decisions, mesh: tuple[int, ...], costs: CostModel) -> MemoryEstimate:
        always = persistent_memory(traced, decisions, mesh, spec)
        timeline = emit_within(traced, decisions, mesh, costs, always.total, options.memory_limit_bytes)[1]
        return memory_estimate(always, timeline)

    return SearchSettings(cluster, spec, options.memory_limit_bytes, memory_of, pin=options.pin)


def _workbench(traced: Trace, cluster: ClusterSpec, *, from_text: bool = False) -> Workbench:
    """For questions about a plan of this trace: what its report solves again."""

    def replan(options: PlanOptions, settings: SearchSettings) -> Plan:
        return _as_plan(traced, cluster, options, search(traced, settings))

    return Workbench(traced, lambda options: _settings(traced, cluster, options), replan, from_text)


def reopen(plan: Plan, model: nn.Module, example_inputs: Call | None = None) -> Workbench:
    """What it takes to solve a loaded plan again; raises PlanMismatch if it was made for another model."""
    traced = _traced(model, example_inputs or sample_call(plan), plan.options.precision)
    _matching(plan, traced)
    return _workbench(traced, plan.cluster, from_text=True)


def _as_plan(traced: Trace, cluster: ClusterSpec, options: PlanOptions, found: SearchResult) -> Plan:
    best = found.best
    roles = axis_roles(traced, best.decisions, best.mesh)
    return Plan(
        graph_hash=graph_hash(traced),
        torch_version=torch.__version__.split("+")[0],
        cluster=cluster,
        mesh=best.mesh,
        roles=roles,
        options=options,
        inputs=tuple(InputShape(i.path, tuple(i.shape), str(i.dtype).removeprefix("torch.")) for i in traced.inputs),
        decisions=best.decisions,
        layout_keys=layout_keys(traced, best.decisions, best.mesh, roles),
        predicted=predicted_figures(
            traced, best.price, best.memory, CostModel(cluster, best.mesh), options.memory_limit_bytes
        ),
        status=found.status,
        objective_s=best.price.step_time_s,
        bound_s=found.bound_s,
        gap=found.gap,
        candidates=found.tried,
        unruled=best.unruled,
    )


def _ready(traced: Trace, plan: Plan, cluster: ClusterSpec, dump_to: Path | None) -> Compiled:
    plan = replace(plan, bench=_workbench(traced, plan.cluster, from_text=True))
    costs = CostModel(plan.cluster, plan.mesh)
    spec = OptimizerSpec(plan.options.optimizer)
    always = persistent_memory(traced, plan.decisions, plan.mesh, spec).total
    check_room(always, cluster.devices, cluster.device.kind)
    emitted, _ = emit_within(traced, plan.decisions, plan.mesh, costs, always, plan.options.memory_limit_bytes)
    if dump_to is not None:
        dump_stages(dump_to, traced, plan, emitted)
    if not plan.mesh:
        return Compiled(traced, plan, RankProgram(emitted, (), ()), None)
    if random_nodes(traced):
        check_same_random_state()
    mesh = device_mesh(cluster.device.kind, plan.mesh)
    groups = [mesh.get_group(axis).group_name for axis in range(len(plan.mesh))]
    return Compiled(traced, plan, RankProgram(emitted, groups, mesh.get_coordinate() or ()), mesh)


def _matching(plan: Plan, traced: Trace) -> Plan:
    shapes = {i.path: (i.shape, i.dtype) for i in plan.inputs}
    now = {i.path: (tuple(i.shape), str(i.dtype).removeprefix("torch.")) for i in traced.inputs}
    if shapes != now:
        raise PlanMismatch(f"the plan was made for inputs {shapes}, this batch is {now}; plan again for this batch")
    if plan.graph_hash != graph_hash(traced):
        raise PlanMismatch(
            "the plan was made for another model (its traced graph differs); plan again for this model, "
            f"with the same torch ({plan.torch_version})"
        )
    check_decisions(traced, plan.decisions, plan.mesh)
    return plan


# -- options ------------------------------------------------------------------------------


def _traced(model: nn.Module, call: Call, precision: str) -> Trace:
    return trace(model, call) if precision == MODEL else trace(model, call, precision=precision)


def with_model(plan: Plan, name: str) -> Plan:
    """The same plan, remembering how the command line loads its model."""
    return replace(plan, options=replace(plan.options, model=name))
