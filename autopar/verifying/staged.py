"""Proves a plan by degrees on CPU: its program is made as on real ranks, and run with its schedule in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from autopar.batch_parts import Call
from autopar.runtime.make_stages import PlanOps, staged_program
from autopar.sample import sample_call
from autopar.staged import StagedPlan
from autopar.trace import Trace
from autopar.verification import VerifyReport
from autopar.verifying.pipeline import verify_pipeline
from autopar.verifying.pipeline_case import staged_case


def verify_staged(
    model: nn.Module,
    plan: StagedPlan,
    example_inputs: Any,
    seed: int,
    trace_of: Callable[[Call], Trace],
    plan_ops: PlanOps,
) -> VerifyReport:
    """Arguments as of `verify` and `staged_program`; the single device computes the whole batch at once."""
    call = example_inputs or sample_call(plan)
    made = staged_program(model, call, plan, trace_of, plan_ops, lambda make: make())
    whole = trace_of(call)
    case = staged_case(model, call, whole, made.trace, made.decisions, made.program, seed=seed, weigh=made.loss.of)
    return verify_pipeline(case, made.orders)
