"""From a plan by degrees to the stages that run here."""

from __future__ import annotations

import json
from collections.abc import Callable

from torch import nn

from autopar.batch_parts import Call, batch_size, samples, split_call
from autopar.cluster import ClusterSpec
from autopar.codegen.stage_nodes import stages_by_blocks
from autopar.codegen.stages import emit_stages
from autopar.cost.model import CostModel
from autopar.drawing import random_nodes
from autopar.micro_batches import SUM, MicroBatchLoss, Weight, micro_batch_loss
from autopar.plans import Plan, PlanOptions
from autopar.runtime.rank_pipeline import RankPipeline
from autopar.runtime.stage_meshes import stage_meshes
from autopar.runtime.staged import CompiledStages
from autopar.runtime.world import agree, check_same_random_state
from autopar.staged import StagedPlan
from autopar.staging import (
    check_runnable,
    micro_batches_of,
    op_options,
    orders_of,
    stage_blocks,
    stage_cluster,
    stage_mesh,
)
from autopar.trace import Trace

PlanOps = Callable[[Trace, ClusterSpec, PlanOptions], Plan]


def make_stages(
    model: nn.Module,
    call: Call,
    plan: StagedPlan,
    trace_of: Callable[[Call], Trace],
    plan_ops: PlanOps,
) -> CompiledStages:
    """Trace a micro-batch, decide on rank 0 how its ops run, cut the program into stages. All ranks call this.

    plan_ops: plans a trace on a cluster, as asked.
    """
    check_runnable(plan)
    micro_batches = micro_batches_of(plan, batch_size(model, call))
    orders, blocks = orders_of(plan, micro_batches), stage_blocks(plan)
    parts = split_call(model, call, micro_batches)
    traced = trace_of(parts[0])
    kind, cluster, mesh = plan.cluster.device.kind, stage_cluster(plan), stage_mesh(plan)

    def decide() -> str:
        weight = SUM
        if micro_batches > 1:
            two = samples(model, call, 0, 2 * batch_size(model, parts[0]))
            weight = micro_batch_loss(trace_of(two), traced).weight
        made = plan_ops(traced, cluster, op_options(plan, traced))
        return json.dumps({"plan": made.dumps(), "weight": [weight.kind, weight.counted]})

    decided = json.loads(agree(decide, kind))
    decisions, loss = Plan.loads(decided["plan"]).decisions, MicroBatchLoss(traced, Weight(*decided["weight"]))
    stages = stages_by_blocks(traced, blocks)
    reduce_each = plan.named.zero >= 2
    program = emit_stages(traced, decisions, mesh, CostModel(cluster, mesh), stages, reduce_each=reduce_each)
    if random_nodes(traced):
        check_same_random_state()
    meshes = stage_meshes(kind, plan.named.pp, mesh)
    placeholders = {p.fqn: p.node for p in traced.params}
    pipeline = RankPipeline(program, orders, placeholders, meshes.place)
    return CompiledStages(traced, plan, decisions.params, pipeline, meshes, loss)
