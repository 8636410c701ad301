"""From a plan by degrees to the stages that run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from autopar.batch_parts import Call, batch_size, split_call
from autopar.cluster import ClusterSpec
from autopar.codegen.stage_nodes import stages_by_blocks
from autopar.codegen.stages import emit_stages
from autopar.cost.model import CostModel
from autopar.plans import Plan, PlanOptions
from autopar.runtime.rank_pipeline import RankPipeline
from autopar.runtime.stage_meshes import stage_meshes
from autopar.runtime.staged import CompiledStages
from autopar.runtime.world import agree
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
    traced = trace_of(split_call(model, call, micro_batches)[0])
    kind, cluster, mesh = plan.cluster.device.kind, stage_cluster(plan), stage_mesh(plan)
    text = agree(lambda: plan_ops(traced, cluster, op_options(plan, traced)).dumps(), kind)
    decided = Plan.loads(text)
    program = emit_stages(
        traced,
        decided.decisions,
        mesh,
        CostModel(cluster, mesh),
        stages_by_blocks(traced, blocks),
        reduce_each=plan.named.zero >= 2,
    )
    meshes = stage_meshes(kind, plan.named.pp, mesh)
    placeholders = {p.fqn: p.node for p in traced.params}
    pipeline = RankPipeline(program, orders, placeholders, meshes.place)
    return CompiledStages(traced, plan, decided.decisions.params, pipeline, meshes, _equal_weights)


def _equal_weights(parts: Sequence[Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Of a loss that is a mean over equal counts."""
    return [torch.tensor(1 / len(parts), dtype=torch.float64) for _ in parts]
