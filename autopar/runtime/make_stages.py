"""From a plan by degrees to the stages that run here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from autopar.batch_parts import Call, batch_size, split_call
from autopar.blocks import blocks_of
from autopar.codegen.stage_nodes import stages_by_blocks
from autopar.codegen.stage_types import PipelineProgram
from autopar.codegen.stages import emit_stages
from autopar.cost.model import CostModel
from autopar.drawing import random_nodes
from autopar.loss_weights import LossWeights, kind_of_loss, loss_weights
from autopar.micro_batches import Weight
from autopar.plan_types import Decisions
from autopar.plans import Plan
from autopar.runtime.rank_pipeline import RankPipeline
from autopar.runtime.stage_meshes import stage_meshes
from autopar.runtime.staged import CompiledStages
from autopar.runtime.world import agree, check_same_random_state
from autopar.simulating.schedules import Order
from autopar.staged import StagedPlan
from autopar.staging import (
    check_runnable,
    gradient_dtype,
    micro_batches_of,
    op_options,
    orders_of,
    stage_blocks,
    stage_cluster,
    stage_mesh,
    stage_roles,
)
from autopar.trace import Trace

PlanOps = Callable[..., Plan]  # (trace, cluster, options, stages=roles of the mesh's axes in each, where they differ)


@dataclass(frozen=True)
class StagedProgram:
    """What a plan by degrees comes to for one model and batch.

    trace: of one micro-batch. orders: what each pipeline rank runs. parts: the calls of the micro-batches. loss: how
    theirs make that of the batch.
    """

    trace: Trace
    decisions: Decisions
    program: PipelineProgram
    orders: tuple[Order, ...]
    parts: list[Call]
    loss: LossWeights


def staged_program(
    model: nn.Module,
    call: Call,
    plan: StagedPlan,
    trace_of: Callable[[Call], Trace],
    plan_ops: PlanOps,
    agreed: Callable[[Callable[[], str]], str],
) -> StagedProgram:
    """Trace a micro-batch, decide how its ops run, cut the program into stages.

    plan_ops: plans a trace on a cluster, as asked, see `PlanOps`. agreed: has one process make a text, and hands it to
        all.
    """
    check_runnable(plan)
    micro_batches = micro_batches_of(plan, batch_size(model, call))
    orders = orders_of(plan, micro_batches)
    parts = split_call(model, call, micro_batches)
    traced = trace_of(parts[0])
    gradient_dtype(plan, traced)
    blocks = blocks_of(model, traced)
    cluster, mesh = stage_cluster(plan), stage_mesh(plan)
    stages = stages_by_blocks(traced, stage_blocks(plan), blocks)

    def decide() -> str:
        weight = kind_of_loss(model, traced, parts[0], micro_batches, trace_of)
        roles = stage_roles(plan, traced, stages.of)
        made = plan_ops(traced, cluster, op_options(plan, traced, blocks), stages=roles)
        return json.dumps({"plan": made.dumps(), "weight": [weight.kind, weight.counted]})

    decided = json.loads(agreed(decide))
    decisions = Plan.loads(decided["plan"]).decisions
    loss = loss_weights(model, traced, parts[0], Weight(*decided["weight"]), trace_of)
    zero = plan.named.zero
    program = emit_stages(
        traced, decisions, mesh, CostModel(cluster, mesh), stages, reduce_each=zero >= 2, gather_each=zero == 3
    )
    return StagedProgram(traced, decisions, program, orders, parts, loss)


def make_stages(
    model: nn.Module, call: Call, plan: StagedPlan, trace_of: Callable[[Call], Trace], plan_ops: PlanOps
) -> CompiledStages:
    """A plan by degrees, ready to run on this rank; rank 0 decides for all. All ranks call this."""
    kind = plan.cluster.device.kind
    made = staged_program(model, call, plan, trace_of, plan_ops, lambda make: agree(make, kind))
    if random_nodes(made.trace):
        check_same_random_state()
    meshes = stage_meshes(kind, plan.named.pp, made.program.mesh)
    placeholders = {p.fqn: p.node for p in made.trace.params}
    sums = gradient_dtype(plan, made.trace)
    pipeline = RankPipeline(made.program, made.orders, placeholders, meshes.place, sums)
    return CompiledStages(made.trace, plan, made.decisions.params, pipeline, meshes, made.loss)
