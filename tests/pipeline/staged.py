"""A model cut into pipeline stages, at the size of one micro-batch, beside the same model on the whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
from autopar.sample import sample_values
from autopar.simulating.schedules import schedule_orders
from autopar.trace import Trace, trace
from autopar.verification import VerifyReport, run_reference
from autopar.verifying.pipeline import StagedCase, verify_pipeline
from tests.parity.simulate import cluster
from tests.widen import widened

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Whole:
    """A model and its batch: the widened trace, and loss and gradients of the single device on all of it."""

    model: nn.Module
    call: Call
    traced: Trace
    values: dict[str, torch.Tensor]
    loss: torch.Tensor
    grads: dict[str, torch.Tensor]

    @staticmethod
    def of(model: nn.Module, call: Call) -> Whole:
        """Trace a model and run its reference."""
        traced = widened(trace(model, call))
        values = sample_values(traced, model, call, seed=0)
        expected = run_reference(traced, values)
        assert traced.loss is not None
        grads = {fqn: expected[node] for fqn, node in traced.grads.items()}
        return Whole(model, call, traced, values, expected[traced.loss], grads)

    @cached_property
    def batch(self) -> int:
        """Samples in the batch."""
        return next(i.shape[0] for i in self.traced.inputs if i.batch_dim == 0)

    def part(self, index: int, count: int) -> Call:
        """The call with micro-batch `index` of `count`."""

        def cut(value: Any) -> Any:
            own = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == self.batch
            return value.chunk(count)[index] if own else value

        return tuple(cut(a) for a in self.call[0]), {k: cut(v) for k, v in self.call[1].items()}


@dataclass(frozen=True)
class Cut:
    """A model cut into stages, for so many micro-batches."""

    whole: Whole
    traced: Trace
    plan: Plan
    program: PipelineProgram
    micro_batches: int

    def case(self, weights: Sequence[float] | None = None) -> StagedCase:
        """What `verify_pipeline` takes."""
        count = self.micro_batches
        batches = [self.values(index) for index in range(count)]
        return StagedCase(self.traced, self.plan.decisions, self.program, batches, weights or [1 / count] * count)

    def values(self, index: int) -> dict[str, torch.Tensor]:
        """Values of the placeholders for one micro-batch."""
        values = sample_values(self.traced, self.whole.model, self.whole.part(index, self.micro_batches), seed=0)
        return {k: v.clone() for k, v in values.items()}

    def verify(self, schedule: str, ranks: int, case: StagedCase | None = None) -> VerifyReport:
        """Run a schedule on so many pipeline ranks."""
        orders = schedule_orders(schedule, ranks, self.micro_batches, len(self.program.stages) // ranks)
        return verify_pipeline(case or self.case(), orders, self.whole.loss, self.whole.grads)


def staged(
    whole: Whole,
    stages: Sequence[int] | StageNodes,
    mesh: tuple[int, ...],
    micro_batches: int,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> Cut:
    """Plan one micro-batch on the mesh of a stage, emit, cut."""
    call = whole.part(0, micro_batches)
    traced = widened(trace(whole.model, call))
    monkeypatch.setattr(autopar.api, "trace", lambda model, call: traced)
    pin = options.pop("pin", {"mesh": list(mesh)} if mesh else None)
    plan = autopar.plan(whole.model, cluster(mesh), example_inputs=call, pin=pin, **options)
    assert plan.mesh == mesh
    nodes = stages if isinstance(stages, StageNodes) else stages_by_blocks(traced, stages)
    program = emit_stages(traced, plan.decisions, mesh, CostModel(plan.cluster, mesh), nodes)
    assert math.prod(program.mesh) == math.prod(mesh)
    return Cut(whole, traced, plan, program, micro_batches)
