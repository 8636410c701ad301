"""Proves a plan by degrees on CPU: its program is made as on real ranks, and run with its schedule in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autopar._torch_compat import pytree
from autopar.batch_parts import Call, split_call
from autopar.drawing import random_nodes
from autopar.errors import AutoparError
from autopar.runtime.make_stages import PlanOps, staged_program
from autopar.sample import sample_call, sample_values
from autopar.staged import StagedPlan
from autopar.trace import Trace, input_leaves
from autopar.verification import VerifyReport, run_reference
from autopar.verifying.pipeline import StagedCase, verify_pipeline


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
    if random_nodes(made.trace):
        raise AutoparError(
            "a plan with stages cannot be verified while the model draws random numbers (dropout): every micro-batch "
            "draws its own; call model.eval() first"
        )
    whole = trace_of(call)
    values = sample_values(whole, model, call, seed)
    filled = _filled(model, call, {i.path: values[i.node] for i in whole.inputs})
    parts = split_call(model, filled, len(made.parts))
    batches = [{n: t.clone() for n, t in sample_values(made.trace, model, one, seed).items()} for one in parts]
    expected = run_reference(whole, values)
    assert whole.loss is not None
    case = StagedCase(made.trace, made.decisions, made.program, batches, made.loss.of(batches))
    grads = {fqn: expected[node] for fqn, node in whole.grads.items()}
    return verify_pipeline(case, made.orders, expected[whole.loss], grads)


def _filled(model: nn.Module, call: Call, values: dict[str, torch.Tensor]) -> Call:
    """The call with these values, by path."""
    leaves, spec = pytree.tree_flatten(call)
    paths = input_leaves(model.forward, *call)
    assert len(paths) == len(leaves)
    found: Call = pytree.tree_unflatten([values.get(p, leaf) for p, leaf in paths.items()], spec)
    return found
