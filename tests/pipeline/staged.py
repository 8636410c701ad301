"""A model cut into pipeline stages, at the size of one micro-batch, beside the same model on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import autopar
import autopar.api
from autopar.codegen.stage_nodes import StageNodes, stages_by_blocks
from autopar.codegen.stage_types import PipelineProgram
from autopar.codegen.stages import emit_stages
from autopar.cost.model import CostModel
from autopar.plans import Plan
from autopar.simulating.schedules import schedule_orders
from autopar.trace import Trace, trace
from autopar.verification import VerifyReport
from autopar.verifying.pipeline import verify_pipeline
from autopar.verifying.pipeline_case import StagedCase, staged_case
from tests.parity.simulate import cluster
from tests.widen import widened

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Whole:
    """A model, its whole batch, and the widened trace of both."""

    model: nn.Module
    call: Call
    traced: Trace

    @staticmethod
    def of(model: nn.Module, call: Call) -> Whole:
        """Trace a model."""
        return Whole(model, call, widened(trace(model, call)))

    def micro_batch(self, count: int) -> Call:
        """The call with the first of `count` micro-batches."""
        batch = next(i.shape[0] for i in self.traced.inputs if i.batch_dim == 0)

        def cut(value: Any) -> Any:
            own = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch
            return value.chunk(count)[0] if own else value

        return tuple(cut(a) for a in self.call[0]), {k: cut(v) for k, v in self.call[1].items()}


@dataclass(frozen=True)
class Cut:
    """A model cut into stages, for so many micro-batches."""

    whole: Whole
    traced: Trace
    plan: Plan
    program: PipelineProgram
    micro_batches: int

    def case(self) -> StagedCase:
        """With values and what the single device makes of them."""
        whole = self.whole
        return staged_case(whole.model, whole.call, whole.traced, self.traced, self.plan.decisions, self.program)

    def again(self, nodes: StageNodes) -> Cut:
        """The same plan, cut elsewhere."""
        costs = CostModel(self.plan.cluster, self.plan.mesh)
        return replace(self, program=emit_stages(self.traced, self.plan.decisions, self.plan.mesh, costs, nodes))

    def verify(self, schedule: str, ranks: int, case: StagedCase | None = None) -> VerifyReport:
        """Run a schedule on so many pipeline ranks."""
        orders = schedule_orders(schedule, ranks, self.micro_batches, len(self.program.stages) // ranks)
        return verify_pipeline(case or self.case(), orders)


def staged(
    whole: Whole,
    stages: Sequence[int] | Callable[[Trace], StageNodes],
    mesh: tuple[int, ...],
    micro_batches: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    reduce_each: bool = False,
    **options: Any,
) -> Cut:
    """Plan one micro-batch on the mesh of a stage, emit, cut: by blocks, or as a function of the trace says."""
    call = whole.micro_batch(micro_batches)
    traced = widened(trace(whole.model, call)) if micro_batches > 1 else whole.traced
    monkeypatch.setattr(autopar.api, "trace", lambda model, call: traced)
    pin = options.pop("pin", {"mesh": list(mesh)} if mesh else None)
    plan = autopar.plan(whole.model, cluster(mesh), example_inputs=call, pin=pin, **options)
    assert plan.mesh == mesh
    nodes = stages(traced) if callable(stages) else stages_by_blocks(traced, stages)
    costs = CostModel(plan.cluster, mesh)
    program = emit_stages(traced, plan.decisions, mesh, costs, nodes, reduce_each=reduce_each)
    return Cut(whole, traced, plan, program, micro_batches)
