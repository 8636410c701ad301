"""Proves a plan on CPU: all ranks of the emitted program in this one process, against the single-device model.

Ranks are simulated by torch's LocalTensorMode: every tensor holds the local tensors of
all ranks, and collectives are computed on them. Loss and all gradients are compared (of
a model that returns no loss: all outputs, and the gradients that random gradients of the
outputs give); if they differ, the program is run again node by node and the first node
whose glued result differs from the traced model's is named. Independently of values, the
sequences of collectives of all ranks are matched, in order, so that no rank waits for
ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from autopar._torch_compat import local_parts, local_tensor, pytree, simulated_mesh
from autopar.codegen.emit import EmittedProgram
from autopar.codegen.schedule import emit_within, persistent_memory
from autopar.compare import coordinates_of as coordinates_of
from autopar.compare import cut as cut
from autopar.compare import glue as glue
from autopar.compare import gradient_errors as gradient_errors
from autopar.compare import relative_error as relative_error
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.dataflow import result_metas, value_name
from autopar.drawing import random_nodes
from autopar.errors import PlanMismatch, RuntimeFailure, VerifyError
from autopar.placements import State, in_groups
from autopar.plan_check import check_decisions
from autopar.plan_types import Decisions
from autopar.plans import Plan
from autopar.runtime.execute import RankProgram
from autopar.runtime.matching import match_collectives as match_collectives
from autopar.sample import sample_call, sample_values
from autopar.trace import Trace, graph_hash, trace

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class VerifyReport:
    """What was compared: the largest relative difference of the loss and of any gradient (and which).

    loss_error: of a model that returns no loss, that of its outputs.
    """

    ranks: int
    loss_error: float
    worst_gradient: str | None
    worst_gradient_error: float
    tolerance: float
    collectives: int

    def __str__(self) -> str:
        worst = f" (worst: {self.worst_gradient})" if self.worst_gradient else ""
        return (
            f"verified on {self.ranks} simulated ranks: loss differs by {self.loss_error:.1e}, gradients by "
            f"{self.worst_gradient_error:.1e}{worst}, tolerance {self.tolerance:.0e}; "
            f"{self.collectives} collectives match on all ranks"
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as a dict."""
        return dict(self.__dict__)


def verify(model: nn.Module, plan: Plan, *, example_inputs: Any = None, seed: int = 0) -> VerifyReport:
    """Prove that the program of `plan` equals `model`; raises VerifyError naming the first node that differs.

    example_inputs: (args, kwargs) to compare on; made up from the plan's shapes if not given.
    """
    call = example_inputs or sample_call(plan)
    traced = trace(model, call, precision=plan.options.precision)
    if graph_hash(traced) != plan.graph_hash:
        raise PlanMismatch("the plan was made for another model or batch (its traced graph differs); plan again")
    check_decisions(traced, plan.decisions, plan.mesh)
    emitted = emit_for(traced, plan)
    values = sample_values(traced, model, call, seed)
    return verify_program(traced, plan.decisions, emitted, values)


def emit_for(traced: Trace, plan: Plan) -> EmittedProgram:
    """The program that `plan` emits for `traced`."""
    spec = OptimizerSpec(plan.options.optimizer)
    always = persistent_memory(traced, plan.decisions, plan.mesh, spec).total
    costs = CostModel(plan.cluster, plan.mesh)
    return emit_within(traced, plan.decisions, plan.mesh, costs, always, plan.options.memory_limit_bytes)[0]


def verify_program(
    traced: Trace, decisions: Decisions, emitted: EmittedProgram, values: Mapping[str, torch.Tensor]
) -> VerifyReport:
    """Compare an emitted program with its trace on given placeholder values (whole tensors by name).

    Random numbers are the program's: the reference computes with what all ranks together have drawn.
    """
    ranks = math.prod(emitted.mesh)
    collectives = match_collectives([emitted] * ranks, emitted.mesh)
    with torch.random.fork_rng(enabled=bool(random_nodes(traced))):
        drawn = drawn_numbers(traced, decisions, emitted, values)
        expected = run_reference(traced, values, drawn)
        tolerance = tolerance_of(traced, values, drawn, expected)
        return _compared(traced, decisions, emitted, values, expected, tolerance, collectives)


def _compared(
    traced: Trace,
    decisions: Decisions,
    emitted: EmittedProgram,
    values: Mapping[str, torch.Tensor],
    expected: Mapping[str, Any],
    tolerance: float,
    collectives: int,
) -> VerifyReport:
    with simulated_ranks(emitted.mesh) as (groups, coordinates):
        simulated = Simulation(traced, decisions, emitted, groups, coordinates)
        try:
            outputs, grads = simulated.step(values)
        except (RuntimeError, IndexError) as error:  # local shapes that do not go together
            node, detail = simulated.first_difference(values, expected, TOLERANCE[torch.float64])
            raise VerifyError(f"the program cannot run ({error}); first node that is wrong: {detail}", node) from error
        errors = gradient_errors(grads, {fqn: expected[node] for fqn, node in traced.grads.items()})
        output_errors = {name: relative_error(tensor, expected[name]) for name, tensor in outputs.items()}
        output = max(output_errors, key=lambda k: output_errors[k])
        output_error = output_errors[output]
        worst = max(errors, key=lambda k: errors[k], default=None)
        worst_error = errors[worst] if worst else 0.0
        if not max(output_error, worst_error) <= tolerance:
            node, detail = simulated.first_difference(values, expected, tolerance)
            what = "loss" if output == traced.loss else f"output {output}"
            what = what if output_error > tolerance or worst is None else f"gradient of {worst}"
            if node is None:  # all values are right, so it is a conversion on the way out
                node = traced.grads[worst] if worst and output_error <= tolerance else output
                detail = f"{node}, as it is handed out"
            raise VerifyError(
                f"the program differs from the single-device model: {what} is off by "
                f"{max(output_error, worst_error):.1e} (tolerance {tolerance:.0e}); first node that differs: {detail}",
                node=node,
            )
    return VerifyReport(math.prod(emitted.mesh), output_error, worst, worst_error, tolerance, collectives)


def tolerance_of(
    traced: Trace,
    values: Mapping[str, torch.Tensor],
    drawn: Mapping[str, torch.Tensor],
    expected: Mapping[str, Any],
) -> float:
    """How far a program may be off: what the least precise of the outputs allows, and any low precision inside.

    Where terms cancel, low precision costs more: then twice of what it costs the single-device model itself, which
    is run again with float32 in its place.
    """
    outputs = {name: expected[name] for name in traced.whole_outputs}
    inside = {t.dtype for n in traced.graph_module.graph.nodes for t in result_metas(n) if t is not None}
    low = inside & set(_LOW)
    dtypes = {t.dtype for t in outputs.values() if t.is_floating_point()} | low
    tolerance = max((TOLERANCE.get(d, 1e-2) for d in dtypes), default=1e-2)
    if not low:
        return tolerance
    try:
        wide = run_reference(traced, {n: _widened(t) for n, t in values.items()}, drawn, widened=True)
    except (RuntimeError, NotImplementedError):  # an op that exists in low precision only: the plain tolerance stands
        return tolerance
    grads = [{f: run[n] for f, n in traced.grads.items()} for run in (expected, wide)]
    errors = [*gradient_errors(*grads).values(), *(relative_error(t, wide[n]) for n, t in outputs.items())]
    return max([tolerance, *(2 * e for e in errors if math.isfinite(e))])


def _widened(value: Any) -> Any:
    """float32 in place of a lower precision, in a tensor or a dtype."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in _LOW else value
    return torch.float32 if value in _LOW else value


def drawn_numbers(
    traced: Trace, decisions: Decisions, emitted: EmittedProgram, values: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What all ranks together draw in one forward pass (whole tensors, by value name)."""
    names = set(random_nodes(traced))
    if not names:
        return {}
    with simulated_ranks(emitted.mesh) as (groups, coordinates):
        simulated = Simulation(traced, decisions, emitted, groups, coordinates)
        return simulated.forward_values(values, names)


def run_reference(
    traced: Trace,
    values: Mapping[str, torch.Tensor],
    drawn: Mapping[str, torch.Tensor] | None = None,
    *,
    widened: bool = False,
) -> dict[str, Any]:
    """Every tensor of the traced joint graph on the given placeholder values, by node name.

    drawn: results of ops (by value name) to take in place of what the ops return.
    widened: compute in float32 where the trace has a lower precision (the values must be widened already).
    """
    found: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
            fetched = super().fetch_args_kwargs_from_env(n)
            return pytree.tree_map_only(torch.dtype, _widened, fetched) if widened else fetched

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, tuple):
                result = tuple((drawn or {}).get(value_name(n, i), r) for i, r in enumerate(result))
            found[n.name] = result = (drawn or {}).get(n.name, result) if not isinstance(result, tuple) else result
            return result

    names = [n.name for n in traced.graph_module.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        Recorder(traced.graph_module).run(*(values[name] for name in names), enable_io_processing=False)
    return found


@contextmanager
def simulated_ranks(mesh: tuple[int, ...]) -> Iterator[tuple[Sequence[str], list[Any]]]:
    """A context in which all ranks of `mesh` run in this process: yields (group names, coordinates per axis)."""
    if not mesh:
        yield [], []
        return
    if dist.is_initialized():
        raise RuntimeFailure("verify simulates all ranks in this one process; call it outside torchrun")
    with simulated_mesh(mesh) as simulated:
        yield simulated


class Simulation:
    """All ranks of one program, on LocalTensors."""

    def __init__(
        self,
        traced: Trace,
        decisions: Decisions,
        emitted: EmittedProgram,
        groups: Sequence[str],
        coordinates: Sequence[Any],
    ) -> None:
        self.traced, self.mesh, self.emitted = traced, emitted.mesh, emitted
        self.program = RankProgram(emitted, groups, coordinates)
        self.states = {p.node: decisions.params[p.fqn] for p in traced.params}
        self.param_states = dict(decisions.params)
        self.ranks = math.prod(emitted.mesh)
        self.random, self.seed = bool(random_nodes(traced)), 0

    def scatter(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A placeholder's local tensors on all ranks."""
        state = self.states.get(name, ("R",) * len(self.mesh))
        if not self.mesh:
            return tensor
        return local_tensor({r: cut(tensor, state, self.mesh, r).clone() for r in range(self.ranks)})

    def gather(self, tensor: torch.Tensor, state: State) -> torch.Tensor:
        """The whole tensor from its local tensors."""
        if not self.mesh:
            return tensor
        parts = local_parts(tensor)
        if parts is None:
            return tensor
        return glue([parts[r] for r in range(self.ranks)], state, self.mesh)

    def start(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Local tensors of all placeholders. Each run starts from the same random state, on all ranks."""
        if self.random:
            torch.manual_seed(self.seed)
        return {name: self.scatter(name, tensor) for name, tensor in values.items()}

    def forward_values(self, values: Mapping[str, torch.Tensor], nodes: set[str]) -> dict[str, torch.Tensor]:
        """The whole results of some ops of the forward pass, by value name."""
        found: dict[str, torch.Tensor] = {}

        class Recorder(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                name, index, state = n.meta.get("version", ("", 0, ()))
                if name in nodes:
                    found[name if index == 0 else f"{name}#{index}"] = gather(result.clone(), state)
                return result

        gather, local = self.gather, self.start(values)
        inputs = [*self.program.coordinates, *(local[n] for n in self.emitted.forward_inputs)]
        with torch.no_grad():
            Recorder(self.program.forward_module).run(*inputs, enable_io_processing=False)
        return found

    def step(self, values: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Outputs and new buffers of floating point by node, gradients by parameter name, all of them whole."""
        local = self.start(values)
        with torch.no_grad():
            outputs, saved = self.program.forward(local)
            grads = self.program.backward(saved, local)
        states = self.emitted.output_states
        whole = {
            name: self.gather(tensor, states[name])
            for name, tensor in zip(self.emitted.output_names, outputs, strict=True)
            if tensor.is_floating_point()
        }
        named = zip(self.emitted.grads, grads, strict=True)
        return whole, {fqn: self.gather(g, self.param_states[fqn]) for fqn, g in named}

    def first_difference(
        self, values: Mapping[str, torch.Tensor], expected: Mapping[str, Any], tolerance: float
    ) -> tuple[str | None, str]:
        """The first node of the program whose glued result is wrong: (node name, description)."""
        local = self.start(values)
        outputs: list[Any] = []
        for module, is_forward in ((self.program.forward_module, True), (self.program.backward_module, False)):
            checker = _Checker(module, self, expected, tolerance)
            if is_forward:
                inputs = [*self.program.coordinates, *(local[n] for n in self.emitted.forward_inputs)]
            else:
                saved = dict(zip(self.emitted.saved, outputs[len(self.emitted.output_names) :], strict=True))
                inputs = list(self.program.coordinates)
                inputs += [saved[v] if v in saved else local[v[0]] for v in self.emitted.backward_inputs]
            with torch.no_grad():
                results = checker.run(*inputs, enable_io_processing=False)
            if checker.wrong:
                return checker.wrong
            outputs = list(results)
        return None, "none"


class _Checker(fx.Interpreter):
    """Runs a rank program node by node and compares every result that has a global meaning."""

    def __init__(
        self, module: fx.GraphModule, simulation: Simulation, expected: Mapping[str, Any], tolerance: float
    ) -> None:
        super().__init__(module)
        self.simulation, self.expected, self.tolerance = simulation, expected, tolerance
        self.nodes = {n.name: n for n in simulation.traced.graph_module.graph.nodes}
        self.wrong: tuple[str, str] | None = None

    def run_node(self, n: fx.Node) -> Any:
        if self.wrong is not None:
            return None  # what follows has nothing right to work on
        try:
            result = super().run_node(n)
        except (RuntimeError, IndexError) as error:
            self.wrong = (str(n.meta.get("origin", n.name)), f"{n.name} ({n.target}) fails: {error}")
            return None
        version = n.meta.get("version")
        if version is not None and not any(in_groups(p) for p in version[2]):  # whose order is that of ranks
            name, index, state = version
            whole = self.expected[name]
            whole = whole[index] if isinstance(whole, (tuple, list)) else whole
            off = relative_error(self.simulation.gather(result, state), whole, self._floor(name))
            if off > self.tolerance:
                self.wrong = (name, f"{name} ({n.target}) in state {state}, off by {off:.1e}")
        return result

    def _floor(self, name: str) -> float:
        """What a node's result is measured against at least: it may be nothing but rounding of its operands."""
        operands = [self.expected[i.name] for i in self.nodes[name].all_input_nodes]
        sizes = [t[torch.isfinite(t)].abs() for t in operands if isinstance(t, torch.Tensor) and t.is_floating_point()]
        return 1e-3 * min((float(s.max()) for s in sizes if s.numel()), default=0.0)
