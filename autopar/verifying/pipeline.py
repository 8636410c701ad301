"""Proves a pipeline on CPU: all stages, all their ranks and the whole schedule in this one process.

The loss of the step and all gradients are compared with those of the single-device model on the whole batch. Where
they differ, the step runs again node by node, and every value of every micro-batch is compared with what the
single-device model computes on that micro-batch: the first that differs is named, with its stage and micro-batch.
Where random numbers are drawn, the single device takes what the pipeline drew, micro-batch by micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.errors import VerifyError
from autopar.placements import replicated
from autopar.runtime.execute import bind_groups
from autopar.runtime.matching import match_graphs
from autopar.simulating.schedules import Order, check_orders
from autopar.verification import (
    TOLERANCE,
    VerifyReport,
    gradient_errors,
    random_nodes,
    relative_error,
    run_reference,
    simulated_ranks,
)
from autopar.verifying.pipeline_case import StagedCase, Values, one_after_the_other
from autopar.verifying.pipeline_run import PipelineRun, Runner, StageGraphs

_SEED = 0


def verify_pipeline(case: StagedCase, orders: Sequence[Order]) -> VerifyReport:
    """Run a step of a pipeline by a schedule; VerifyError unless loss and gradients are the single-device model's.

    orders: of every pipeline rank, see `autopar.simulating.schedules`.
    """
    chunks = len(case.program.stages) // len(orders)
    if chunks * len(orders) != len(case.program.stages):
        raise VerifyError(f"{len(case.program.stages)} stages cannot be dealt to {len(orders)} pipeline ranks evenly")
    check_orders(orders, len(case.batches), chunks)
    collectives = _match_collectives(case)
    with torch.random.fork_rng(enabled=True), simulated_ranks(case.mesh) as simulated:
        verifier = _Verifier(case, orders, *simulated)
        return replace(verifier.compare(), collectives=collectives)


def run_step(case: StagedCase, orders: Sequence[Order]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients (whole) of a step by a schedule, as the pipeline computes them."""
    with torch.random.fork_rng(enabled=True), simulated_ranks(case.mesh) as simulated:
        verifier = _Verifier(case, orders, *simulated)
        return verifier.results(verifier.run(verifier.graphs))


def _match_collectives(case: StagedCase) -> int:
    """How many collectives a rank issues for one micro-batch, all stages together, and to reduce its gradients."""
    count = 0
    for stage in case.program.stages:
        graphs = [stage.forward.graph, stage.backward.graph, stage.weights.graph, stage.reduce]
        graphs += [] if stage.gather is None else [stage.gather.graph]
        count += match_graphs([graphs] * case.ranks, case.mesh)
    return count


class _Verifier:
    """The comparison, on simulated ranks."""

    def __init__(
        self, case: StagedCase, orders: Sequence[Order], groups: Sequence[str], coordinates: Sequence[Any]
    ) -> None:
        self.case, self.orders, self.groups, self.coordinates = case, orders, groups, coordinates
        self.random = bool(random_nodes(case.trace))
        self.graphs = StageGraphs(case.program, groups, coordinates)

    def run(self, runner: Runner) -> PipelineRun:
        """One step; each starts from the same random numbers."""
        torch.manual_seed(_SEED)
        shared, batches = self.case.start()
        run = PipelineRun(self.case.program, shared, batches, runner)
        run.follow(self.orders)
        return run

    def compare(self) -> VerifyReport:
        """Loss and all gradients."""
        case = self.case
        drawn = self._drawn() if self.random else [{} for _ in case.batches]
        loss, grads = (case.loss, case.grads)
        if self.random:
            loss, grads = one_after_the_other(case.trace, case.batches, case.weights, drawn)
        tolerance = TOLERANCE.get(loss.dtype, 1e-2)
        try:
            found_loss, found = self.results(self.run(self.graphs))
        except (RuntimeError, IndexError) as error:
            raise VerifyError(f"the pipeline cannot run ({error}); {self._first_difference(drawn)}") from error
        loss_error = relative_error(found_loss, loss)
        if found.keys() != grads.keys():
            raise VerifyError(f"the pipeline makes no gradient of {', '.join(sorted(grads.keys() - found.keys()))}")
        errors = gradient_errors(found, grads)
        worst = max(errors, key=lambda k: errors[k], default=None)
        worst_error = errors[worst] if worst else 0.0
        if not max(loss_error, worst_error) <= tolerance:
            what = "loss" if not loss_error <= tolerance else f"gradient of {worst}"
            raise VerifyError(
                f"the pipeline differs from the single-device model: {what} is off by "
                f"{max(loss_error, worst_error):.1e} (tolerance {tolerance:.0e}); {self._first_difference(drawn)}"
            )
        return VerifyReport(case.ranks * len(self.orders), loss_error, worst, worst_error, tolerance, 0)

    def _drawn(self) -> list[Values]:
        """What each micro-batch draws (whole tensors, by value name)."""
        found: list[dict[str, torch.Tensor]] = [{} for _ in self.case.batches]
        names = set(random_nodes(self.case.trace))

        def record(n: fx.Node, result: Any, micro_batch: int, where: str) -> None:
            name, index, state = n.meta["version"]
            if name in names:
                key = name if index == 0 else f"{name}#{index}"
                found[micro_batch][key] = self.case.gather(result.clone(), state)

        self.run(_NodeByNode(self, record))
        return list(found)

    def results(self, run: PipelineRun) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and gradients of the step, whole."""
        case = self.case
        assert case.trace.loss is not None
        made = [case.gather(outputs[case.trace.loss], replicated(len(case.mesh))) for outputs in run.outputs]
        losses = [loss * w for loss, w in zip(made, case.weights, strict=True) if w]
        grads: dict[str, torch.Tensor] = {}
        for stage, sums in zip(case.program.stages, run.sums, strict=True):
            for fqn, grad in self.graphs.reduced(stage, sums).items():
                whole = case.gather(grad, case.decisions.params[fqn])
                grads[fqn] = grads[fqn] + whole if fqn in grads else whole
        return torch.stack(losses).sum(), grads

    def _first_difference(self, drawn: Sequence[Values]) -> str:
        """Run the step once more, each value compared with the single-device model on its micro-batch."""
        case = self.case
        expected = [run_reference(case.trace, v, d) for v, d in zip(case.batches, drawn, strict=True)]
        nodes = {n.name: n for n in case.trace.graph_module.graph.nodes}

        def compare(n: fx.Node, result: Any, micro_batch: int, where: str) -> None:
            name, index, state = n.meta["version"]
            found = expected[micro_batch]
            whole = found[name][index] if isinstance(found[name], (tuple, list)) else found[name]
            floor = _floor([found[i.name] for i in nodes[name].all_input_nodes])
            off = relative_error(case.gather(result, state), whole, floor)
            if off > TOLERANCE.get(whole.dtype, TOLERANCE[torch.float64]):
                raise _Found(f"{name} ({n.target}) {where}, in state {state}, off by {off:.1e}")

        try:
            self.run(_NodeByNode(self, compare))
        except _Found as found:
            return f"first node that differs: {found}"
        return "all values of all micro-batches are right: it is how losses are weighed or gradients reduced"


def _floor(operands: Sequence[Any]) -> float:
    """What a result is measured against at least: it may be nothing but rounding of its operands."""
    sizes = [t.abs() for t in operands if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]
    return 1e-3 * min((float(s.max()) for s in sizes), default=0.0)


class _Found(Exception):
    """The first value that differs."""


class _NodeByNode:
    """Runs the graphs of stages node by node (a `Runner`) and shows every whole value.

    see: gets the node, its result, the micro-batch, and in words where that is.
    """

    def __init__(self, verifier: _Verifier, see: Any) -> None:
        self.verifier, self.see = verifier, see

    def __call__(self, stage: int, micro_batch: int, name: str, inputs: list[Any]) -> Sequence[Any]:
        graph = bind_groups(getattr(self.verifier.case.program.stages[stage], name).graph, self.verifier.groups)
        see, where = self.see, f"in the {name} pass of micro-batch {micro_batch} on stage {stage}"

        class Interpreter(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                try:
                    result = super().run_node(n)
                except (RuntimeError, IndexError) as error:
                    raise _Found(f"{n.name} ({n.target}) {where} fails: {error}") from error
                if n.op == "call_function" and "version" in n.meta:
                    see(n, result, micro_batch, where)
                return result

        module = fx.GraphModule(torch.nn.Module(), graph)
        return list(Interpreter(module).run(*self.verifier.coordinates, *inputs, enable_io_processing=False))
