"""A plan with stages on simulated ranks against the eager model: losses, gradients, parameters after AdamW steps."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

import autopar.api
from autopar.runtime.make_stages import StagedProgram, staged_program
from autopar.sample import Call
from autopar.staged import StagedPlan
from autopar.trace import Trace, trace
from autopar.tracing.capture import find_loss
from autopar.verification import gradient_errors, relative_error
from autopar.verifying.pipeline import run_step, verify_pipeline
from autopar.verifying.pipeline_case import StagedCase, staged_case
from tests.parity.simulate import TOLERANCE, adamw
from tests.widen import WidenCasts, widened

STEPS = 3


def assert_trains_alike(model: nn.Module, call: Call, plan: StagedPlan) -> StagedProgram:
    """`verify` on the first step, then three steps of AdamW: everything equal to the eager model's."""

    def trace_of(one: Call) -> Trace:
        return widened(trace(model, one))

    made = staged_program(model, call, plan, trace_of, autopar.api._plan_trace, lambda make: make())
    whole = trace_of(call)
    case = staged_case(model, call, whole, made.trace, made.decisions, made.program, weigh=made.loss.of)
    report = verify_pipeline(case, made.orders)
    assert report.ranks == plan.devices
    eager = copy.deepcopy(model)
    theirs = adamw(eager.parameters())
    nodes = {p.fqn: p.node for p in made.trace.params}
    mine = {fqn: nn.Parameter(case.batches[0][node].clone()) for fqn, node in nodes.items()}
    optimizer = adamw(mine.values())
    for step in range(STEPS):
        loss, grads = run_step(_with_parameters(case, {nodes[f]: p.detach() for f, p in mine.items()}), made.orders)
        with WidenCasts():
            expected = find_loss(eager(*call[0], **call[1]))
            expected.backward()
        assert relative_error(loss, expected.detach()) <= TOLERANCE, f"loss of step {step}"
        _assert_equal(grads, {n: p.grad for n, p in eager.named_parameters() if p.grad is not None}, f"step {step}")
        for fqn, grad in grads.items():
            mine[fqn].grad = grad.clone()
        for one in (optimizer, theirs):
            one.step()
            one.zero_grad()
    _assert_equal({n: p.detach() for n, p in mine.items()}, {n: p.detach() for n, p in eager.named_parameters()}, "end")
    return made


def _with_parameters(case: StagedCase, values: dict[str, torch.Tensor]) -> StagedCase:
    return replace(case, batches=[{**batch, **values} for batch in case.batches])


def _assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str) -> None:
    assert found.keys() == expected.keys()
    errors = gradient_errors(found, expected)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= TOLERANCE, f"{where}: {worst} is off by {errors[worst]:.1e}"
