"""From a plan by degrees to the question of how each op of one micro-batch runs on the mesh of a stage.

A stage's data, tensor and sequence ranks are those of the layout, and so are ZeRO and recomputation; all else is the
planner's to decide, op by op, as for a plan without stages. The memory of the layout was settled when it was chosen:
the model as a whole is asked about here, of which a rank will hold one stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.cluster import ClusterSpec
from autopar.dataflow import is_backward, module_path, result_metas
from autopar.errors import AutoparError, LayoutError, PlanMismatch
from autopar.pins_by_stage import StageRoles
from autopar.plans import PlanOptions
from autopar.predicting.stages import per_chunk
from autopar.simulating.schedules import Order, schedule_orders
from autopar.stage_shapes import common_mesh
from autopar.staged import StagedPlan, experts_on_context
from autopar.trace import Trace

_NO_LIMIT_BYTES = 2**60


def check_runnable(plan: StagedPlan) -> None:
    """AutoparError for what no program can be made of yet."""
    if plan.not_yet:
        raise AutoparError(plan.not_yet)


def stage_mesh(plan: StagedPlan) -> tuple[int, ...]:
    """The axes of a stage that have more than one rank: see `stage_axes`."""
    return tuple(size for size in plan.mesh if size > 1)


def stage_cluster(plan: StagedPlan) -> ClusterSpec:
    """The devices of one stage."""
    return plan.cluster.part(math.prod(plan.mesh))


def gradient_dtype(plan: StagedPlan, trace: Trace) -> torch.dtype | None:
    """In which a program adds up gradients where that is wider than they are; None: in their own dtype.

    float32, the default, leaves wider gradients as they are. LayoutError where parameters are wider than another
    `grad_dtype`: torch takes no gradient that is narrower than its parameter.
    """
    name = plan.named.grad_dtype
    if name is None:
        return None
    dtype: torch.dtype = getattr(torch, name)
    widest = max((p.dtype for p in trace.params), key=lambda d: d.itemsize, default=dtype)
    if widest.itemsize > dtype.itemsize and name != "float32":
        params = str(widest).removeprefix("torch.")
        raise LayoutError(
            f"layout: grad_dtype={name} can be priced, not run, for parameters in {params}: "
            "their gradients are as wide as they are; leave grad_dtype out"
        )
    return dtype


def micro_batches_of(plan: StagedPlan, batch: int) -> int:
    """Into how many micro-batches a batch goes; PlanMismatch if it does not divide."""
    layout = plan.named
    try:
        return layout.micro_batches(batch)
    except LayoutError:
        share = layout.dp * layout.micro_batch
        raise PlanMismatch(
            f"the batch of {batch} does not divide into micro-batches of dp * micro_batch = {layout.dp} * "
            f"{layout.micro_batch} = {share} samples; pass a multiple of {share}, or plan again"
        ) from None


def orders_of(plan: StagedPlan, micro_batches: int) -> tuple[Order, ...]:
    """What each pipeline rank runs; LayoutError where the schedule does not go with so many micro-batches."""
    layout = plan.named
    return schedule_orders(layout.schedule, layout.pp, micro_batches, layout.vpp)


def stage_blocks(plan: StagedPlan) -> tuple[int, ...]:
    """Repeated blocks of every stage, first to last: with several chunks a rank, chunk c of rank i is stage c * pp + i.

    LayoutError where a rank has fewer blocks than chunks.
    """
    chunks = plan.named.vpp
    poor = [rank for rank, blocks in enumerate(plan.blocks) if chunks > 1 and blocks < chunks]
    if poor:
        raise LayoutError(
            f"layout: pipeline rank {poor[0]} has {plan.blocks[poor[0]]} blocks for vpp={chunks} chunks; change vpp or "
            "pp: a chunk needs a block"
        )
    return tuple(of_rank[chunk] for chunk in range(chunks) for of_rank in per_chunk(plan.blocks, chunks))


def op_options(plan: StagedPlan, trace: Trace, blocks: Sequence[str]) -> PlanOptions:
    """What the plan op by op of a micro-batch is asked for. trace: of that micro-batch. blocks: paths of all blocks."""
    layout, again = plan.named, _recompute_pins(plan, trace, blocks)
    pins: dict[str, Any] = {"dp": layout.dp, "tp": layout.tp}
    if layout.ep > 1:
        dp = layout.dp if experts_on_context(layout) else layout.dp // layout.ep
        pins.update(dp=dp, ep=layout.ep, expert_dispatch="data")
    if layout.cp > 1:
        pins["cp"] = layout.cp
    if layout.tp > 1:
        pins["sp"] = layout.sp
    if layout.shapes is not None:  # what the axes are for depends on the stage, see `stage_roles`
        pins = {"mesh": list(plan.mesh), "sp": layout.sp}
    batch = layout.micro_batch * layout.dp
    pins.update(zero=layout.zero, **again)
    return replace(plan.options, global_batch=batch, memory_limit_bytes=_NO_LIMIT_BYTES, pin=pins)


def stage_roles(plan: StagedPlan, trace: Trace, of: Mapping[str, int | None]) -> StageRoles | None:
    """What the axes of the mesh are for in each stage, where stages differ in shape. of: the stage of every op."""
    layout = plan.named
    if layout.shapes is None:
        return None
    roles = common_mesh(layout.shapes)[1]
    return StageRoles.of_ops(trace, tuple(roles[stage % layout.pp] for stage in range(layout.pp * layout.vpp)), of)


def _recompute_pins(plan: StagedPlan, trace: Trace, blocks: Sequence[str]) -> Mapping[str, str]:
    layout = plan.named
    if layout.recompute == "selective":
        return _selective(trace)
    if layout.recompute == "full" and layout.recompute_blocks is not None:
        return _some_blocks(plan, blocks, layout.recompute_blocks)
    return {"recompute": layout.recompute}


def _forward_paths(trace: Trace) -> list[str]:
    nodes = [n for n in trace.graph_module.graph.nodes if n.op == "call_function" and not is_backward(n)]
    return list(dict.fromkeys(path for n in nodes if (path := module_path(n))))


def _some_blocks(plan: StagedPlan, blocks: Sequence[str], count: int) -> Mapping[str, str]:
    """The first blocks of every pipeline rank run again, so many a rank; nothing else does."""
    left, pins, at = [count] * plan.named.pp, {}, 0
    for stage, size in enumerate(stage_blocks(plan)):
        rank = stage % plan.named.pp
        for block in blocks[at : at + size]:
            pins[block] = "recompute" if left[rank] > 0 else "keep"
            left[rank] -= 1
        at += size
    return pins


def _selective(trace: Trace) -> Mapping[str, str]:
    """Modules that make scores of all pairs of tokens run again in what they do themselves; their parts do not.

    Deep modules first: the first pin that names a module counts.
    """
    batch, tokens = next((i.shape[:2] for i in trace.inputs if i.batch_dim == 0 and len(i.shape) > 1), (0, 0))
    nodes = [n for n in trace.graph_module.graph.nodes if n.op == "call_function" and not is_backward(n)]
    core = {module_path(n) for n in nodes if _makes_scores(n, batch, tokens)} - {""}
    paths = sorted(_forward_paths(trace), key=lambda path: -path.count("."))
    return {path: "recompute" if path in core else "keep" for path in paths}


def _makes_scores(node: fx.Node, batch: int, tokens: int) -> bool:
    """Scores, of several heads: a mask has one number for each pair of tokens of a sample."""
    return tokens > 1 and any(
        t is not None and t.dim() > 2 and t.shape[-1] == t.shape[-2] == tokens and math.prod(t.shape[:-2]) > batch
        for t in result_metas(node)
    )
