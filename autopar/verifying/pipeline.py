"""Proves a pipeline on CPU: all stages, all their ranks and the whole schedule in this one process.

The loss of the step and all gradients are compared with those of the single-device model on the global batch. Where
they differ, the step runs again node by node, and every value of every micro-batch is compared with what the
single-device model computes on that micro-batch: the first that differs is named, with its stage and micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import local_parts, local_tensor
from autopar.codegen.stage_types import PipelineProgram
from autopar.compare import cut, glue
from autopar.errors import VerifyError
from autopar.placements import State, replicated
from autopar.plan_types import Decisions
from autopar.runtime.execute import bind_groups
from autopar.simulating.schedules import Order, check_orders
from autopar.trace import Trace
from autopar.verification import (
    TOLERANCE,
    VerifyReport,
    gradient_errors,
    relative_error,
    run_reference,
    simulated_ranks,
)
from autopar.verifying.pipeline_run import PipelineRun, StageGraphs, Values


class StagedCase:
    """A pipeline and what it must equal.

    trace: of one micro-batch. batches: values of the placeholders of `trace`, per micro-batch: parameters, buffers and
    constants are the same in all of them. weights: the loss of the step is the sum of the losses of the micro-batches
    by these; they are also what each micro-batch's backward pass starts from.
    """

    def __init__(
        self,
        trace: Trace,
        decisions: Decisions,
        program: PipelineProgram,
        batches: Sequence[Values],
        weights: Sequence[float],
    ) -> None:
        self.trace, self.program, self.mesh = trace, program, program.mesh
        (tangent,) = trace.tangents
        self.weights = weights
        self.batches = [
            {**values, tangent: torch.full_like(values[tangent], weight)}
            for values, weight in zip(batches, weights, strict=True)
        ]
        self.states = {p.node: decisions.params[p.fqn] for p in trace.params}
        self.param_states = decisions.params
        self.ranks = math.prod(self.mesh)

    def scatter(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The local tensors of a placeholder on all ranks of a stage."""
        if not self.mesh:
            return tensor
        state = self.states.get(name, replicated(len(self.mesh)))
        return local_tensor({r: cut(tensor, state, self.mesh, r).clone() for r in range(self.ranks)})

    def gather(self, tensor: torch.Tensor, state: State) -> torch.Tensor:
        """The whole tensor from its local tensors."""
        parts = local_parts(tensor) if self.mesh else None
        return tensor if parts is None else glue([parts[r] for r in range(self.ranks)], state, self.mesh)

    def start(self) -> tuple[Values, list[Values]]:
        """What all micro-batches share and what each brings, as local tensors."""
        own = {i.node for i in self.trace.inputs} | set(self.trace.tangents)
        shared = {n: self.scatter(n, t) for n, t in self.batches[0].items() if n not in own}
        return shared, [{n: self.scatter(n, batch[n]) for n in own} for batch in self.batches]


def verify_pipeline(
    case: StagedCase, orders: Sequence[Order], loss: torch.Tensor, grads: Mapping[str, torch.Tensor]
) -> VerifyReport:
    """Run a step of a pipeline by a schedule; VerifyError unless loss and gradients are the expected ones.

    orders: of every pipeline rank, see `autopar.simulating.schedules`. loss, grads: of the single-device model on the
    global batch.
    """
    chunks = len(case.program.stages) // len(orders)
    if chunks * len(orders) != len(case.program.stages):
        raise VerifyError(f"{len(case.program.stages)} stages cannot be dealt to {len(orders)} pipeline ranks evenly")
    check_orders(orders, len(case.batches), chunks)
    tolerance = TOLERANCE.get(loss.dtype, 1e-2)
    with simulated_ranks(case.mesh) as (groups, coordinates):
        graphs = StageGraphs(case.program, groups, coordinates)
        shared, batches = case.start()
        run = PipelineRun(case.program, shared, batches, graphs)
        try:
            run.follow(orders)
            found_loss, found = _results(case, run, graphs)
        except (RuntimeError, IndexError) as error:
            wrong = _first_difference(case, orders, groups, coordinates)
            raise VerifyError(f"the pipeline cannot run ({error}); {wrong}") from error
        loss_error = relative_error(found_loss, loss)
        if found.keys() != grads.keys():
            raise VerifyError(f"the pipeline makes no gradient of {', '.join(sorted(grads.keys() - found.keys()))}")
        errors = gradient_errors(found, grads)
        worst = max(errors, key=lambda k: errors[k], default=None)
        worst_error = errors[worst] if worst else 0.0
        if not max(loss_error, worst_error) <= tolerance:
            what = "loss" if not loss_error <= tolerance else f"gradient of {worst}"
            wrong = _first_difference(case, orders, groups, coordinates)
            raise VerifyError(
                f"the pipeline differs from the single-device model: {what} is off by "
                f"{max(loss_error, worst_error):.1e} (tolerance {tolerance:.0e}); {wrong}"
            )
    return VerifyReport(case.ranks * len(orders), loss_error, worst, worst_error, tolerance, 0)


def _results(case: StagedCase, run: PipelineRun, graphs: StageGraphs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the step, whole."""
    assert case.trace.loss is not None
    losses = [case.gather(outputs[case.trace.loss], replicated(len(case.mesh))) for outputs in run.outputs]
    loss = sum(w * x for w, x in zip(case.weights, losses, strict=True) if w)
    assert isinstance(loss, torch.Tensor)
    grads: dict[str, torch.Tensor] = {}
    for stage, sums in zip(case.program.stages, run.sums, strict=True):
        for fqn, grad in graphs.reduced(stage, sums).items():
            whole = case.gather(grad, case.param_states[fqn])
            grads[fqn] = grads[fqn] + whole if fqn in grads else whole
    return loss, grads


def _first_difference(
    case: StagedCase, orders: Sequence[Order], groups: Sequence[str], coordinates: Sequence[Any]
) -> str:
    """Run the step once more, each value compared with the single-device model on its micro-batch."""
    expected = [run_reference(case.trace, values) for values in case.batches]
    checker = _Checker(case, expected, groups, coordinates)
    shared, batches = case.start()
    try:
        PipelineRun(case.program, shared, batches, checker).follow(orders)
    except _Found as found:
        return f"first node that differs: {found}"
    return "all values of all micro-batches are right: it is how losses are weighed or gradients reduced"


class _Found(Exception):
    """The first value that differs."""


class _Checker:
    """Runs the graphs of stages node by node (a `Runner`) and compares."""

    def __init__(
        self, case: StagedCase, expected: Sequence[Mapping[str, Any]], groups: Sequence[str], coordinates: Sequence[Any]
    ) -> None:
        self.case, self.expected, self.groups, self.coordinates = case, expected, groups, list(coordinates)
        self.nodes = {n.name: n for n in case.trace.graph_module.graph.nodes}

    def __call__(self, stage: int, micro_batch: int, name: str, inputs: list[Any]) -> Sequence[Any]:
        graph = bind_groups(getattr(self.case.program.stages[stage], name).graph, self.groups)
        checker, where = self, f"in the {name} pass of micro-batch {micro_batch} on stage {stage}"

        class Interpreter(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                try:
                    result = super().run_node(n)
                except (RuntimeError, IndexError) as error:
                    raise _Found(f"{n.name} ({n.target}) {where} fails: {error}") from error
                if n.op == "call_function" and "version" in n.meta:
                    checker.compare(n, result, micro_batch, where)
                return result

        module = fx.GraphModule(torch.nn.Module(), graph)
        made = Interpreter(module).run(*self.coordinates, *inputs, enable_io_processing=False)
        return list(made)

    def compare(self, n: fx.Node, result: Any, micro_batch: int, where: str) -> None:
        """Stop at a value that is not the single-device model's."""
        name, index, state = n.meta["version"]
        whole = self.expected[micro_batch][name]
        whole = whole[index] if isinstance(whole, (tuple, list)) else whole
        operands = [self.expected[micro_batch][i.name] for i in self.nodes[name].all_input_nodes]
        sizes = [t.abs() for t in operands if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]
        floor = 1e-3 * min((float(s.max()) for s in sizes), default=0.0)
        off = relative_error(self.case.gather(result, state), whole, floor)
        if off > TOLERANCE.get(whole.dtype, TOLERANCE[torch.float64]):
            raise _Found(f"{name} ({n.target}) {where}, in state {state}, off by {off:.1e}")
