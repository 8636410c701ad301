"""The program a user holds: an ordinary nn.Module whose parameters are DTensors.

Parameters and buffers bear the model's own names. Until the first call (or at once, with
`example_inputs`) nothing is cut: parameters are replicated DTensors that share the
model's storage. Then the plan is made, and each parameter takes its placement in place,
so an optimizer that was made before keeps working.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar._torch_compat import dtensor_maker, local_detached, pytree
from autopar.errors import RuntimeFailure
from autopar.placements import State
from autopar.plans import Plan
from autopar.precision import autocast_dtype
from autopar.runtime.binding import bind_inputs
from autopar.runtime.clipping import clip_grad_norm
from autopar.runtime.execute import RankProgram, wait_for
from autopar.runtime.failure import naming_dead_ranks
from autopar.runtime.gradients import accumulate, gradient_sources, is_watched, tangent
from autopar.runtime.host_state import HostState
from autopar.runtime.ordering import OutputOrder
from autopar.runtime.parameters import distribute_loaded, mirror, place, torch_placements
from autopar.runtime.stage_peaks import peak_bytes_per_stage
from autopar.runtime.staged import CompiledStages
from autopar.trace import Trace

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Compiled:
    """One plan made ready to run: for one shape of inputs and one mode (training or not)."""

    def __init__(self, trace: Trace, plan: Plan, rank_program: RankProgram, mesh: DeviceMesh | None) -> None:
        self.trace, self.plan, self.rank_program, self.mesh = trace, plan, rank_program, mesh
        self.order = OutputOrder(trace, plan, rank_program.emitted.output_states)
        self.backward_needs = {name for name, _ in rank_program.emitted.backward_inputs}
        self.device_type = plan.cluster.device.kind
        self.gradient_makers: dict[
            object, Callable[[torch.Tensor], DTensor]
        ] = {}  # by name and layout of a gradient, from the first of the kind
        self.tangents_of = gradient_sources(trace)
        self.tangent_metas = {n.name: n.meta["val"] for n in trace.graph_module.graph.nodes if n.name in trace.tangents}

    @property
    def params(self) -> Mapping[str, State]:
        """How each parameter is stored, by name."""
        return self.plan.decisions.params

    def own_precision(self) -> torch.autocast:
        """A context in which ops compute in the dtypes that the trace has given them."""
        return torch.autocast(self.device_type, enabled=False)

    def place(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """A parameter where the plan stores it, from rank 0's values."""
        return place(source, self.plan.decisions.params[name], self.mesh)


Planner = Callable[[nn.Module, Call, "Mapping[str, State] | None"], Compiled | CompiledStages]


class Program(nn.Module):
    """Runs a model under a plan. Made by `autopar.compile`.

    plan: the plan in use (None before the first call).
    """

    def __init__(self, model: nn.Module, planner: Planner, world: DeviceMesh | None) -> None:
        super().__init__()
        self._model = [model]  # in a list: not a submodule, its weights are not ours
        self._planner = planner
        self._compiled: dict[object, Compiled | CompiledStages] = {}
        self._first: Compiled | CompiledStages | None = None
        self._host_state: HostState | None = None
        mirror(self, model, world)
        self.register_load_state_dict_pre_hook(distribute_loaded)
        self.train(model.training)

    # -- calling -------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for the global batch.

        The loss is differentiable and whole on every rank; what else the model returns is not differentiable and
        comes as DTensors. A model without a loss returns all its tensors whole on every rank, differentiable as on
        one device: every rank computes the same loss of them.
        With pipeline stages it evaluates, without gradients only: the loss is whole on every rank, and None stands for
        what else the model returns.
        """
        if isinstance(self._first or self.prepare((args, kwargs)), CompiledStages):
            if torch.is_grad_enabled():
                raise RuntimeFailure(
                    "the plan has pipeline stages or micro-batches, whose forward and backward passes take turns: call "
                    "program.train_step(...) instead of program(...), or evaluate under torch.no_grad()"
                )
            return self._staged_evaluation((args, kwargs))
        result, under_way = self._call(args, kwargs, wait=True)
        assert not under_way
        return result

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, wait: bool) -> tuple[Any, list[torch.Tensor]]:
        """What the model returns; without `wait` the loss alone, and the tensors that may still be on their way."""
        compiled = self.prepare((args, kwargs))
        assert isinstance(compiled, Compiled)
        check_autocast(compiled.plan)
        trace = compiled.trace
        inputs = bind_inputs(trace, self._model[0], args, kwargs)
        params = dict(self.named_parameters())
        ordered = [params[p.fqn] for p in trace.params]
        with naming_dead_ranks(compiled.mesh):
            at_once = not wait and not any(map(is_watched, ordered))
            outputs = _Step.apply(compiled, self._buffer_values(trace), inputs, wait, at_once, *ordered)
        by_name = dict(zip(compiled.rank_program.emitted.output_names, outputs, strict=True))
        for fqn, node in trace.buffer_updates.items():
            self.get_buffer(fqn).copy_(by_name[node])
        leaves = [o.node for o in trace.outputs if o.node is not None]
        under_way = [] if wait else [outputs[i] for i in compiled.rank_program.under_way]
        wanted = [self._wrap(compiled, n, by_name[n]) if wait or n == trace.loss else None for n in leaves]
        return trace.rebuild_output(wanted), under_way

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward in one; gradients are accumulated in `.grad`; returns the loss, detached, on every rank.

        With stages, a rank has gradients of the parameters of its own stage only.
        """
        compiled = self.prepare((args, kwargs))
        if compiled.trace.loss is None:
            raise RuntimeFailure(
                "train_step needs a model that returns its loss; compute the loss of program(...) yourself and call "
                "loss.backward()"
            )
        if isinstance(compiled, CompiledStages):
            return self._staged_step(compiled, (args, kwargs))
        result, under_way = self._call(args, kwargs, wait=False)
        loss = _loss_of(result)
        del result
        loss.backward()
        with naming_dead_ranks(self._ready("train_step").mesh):
            for tensor in under_way:
                wait_for(tensor.detach())
        return loss.detach()

    def _staged_step(self, compiled: CompiledStages, call: Call) -> torch.Tensor:
        check_autocast(compiled.plan)
        if not torch.is_grad_enabled():
            raise RuntimeFailure("train_step computes gradients: call it outside of torch.no_grad()")
        params = dict(self.named_parameters())
        with naming_dead_ranks(compiled.meshes):
            loss, grads = compiled.step(self._model[0], call, self._shared_values(compiled.trace, params))
            self._update_buffers(compiled)
        accumulate([params[fqn] for fqn in grads], list(grads.values()))
        return loss

    def _staged_evaluation(self, call: Call) -> Any:
        """What the model returns, but for the loss None."""
        compiled = self.prepare(call)
        assert isinstance(compiled, CompiledStages)
        check_autocast(compiled.plan)
        with naming_dead_ranks(compiled.meshes):
            params = dict(self.named_parameters())
            loss = compiled.evaluate(self._model[0], call, self._shared_values(compiled.trace, params))
            self._update_buffers(compiled)
        made = compiled.trace
        return made.rebuild_output([loss if o.node == made.loss else None for o in made.outputs if o.node is not None])

    def _shared_values(self, trace: Trace, params: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {p.node: local_detached(params[p.fqn]) for p in trace.params} | self._buffer_values(trace)

    def _update_buffers(self, compiled: CompiledStages) -> None:
        for fqn, value in compiled.buffers().items():
            self.get_buffer(fqn).copy_(value)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, over the gradients of all ranks; returns their norm before.

        torch's own function does the same for a program without stages; with stages it would see only the gradients
        of one stage, and clip each stage by another norm.
        """
        compiled = self._ready("clip_grad_norm_")
        pipeline = compiled.meshes.place.pipeline if isinstance(compiled, CompiledStages) else None
        with naming_dead_ranks(compiled.mesh):
            return clip_grad_norm(self.parameters(), max_norm, norm_type, pipeline)

    def peak_bytes_per_stage(self) -> tuple[int, ...]:
        """Of each pipeline rank, first to last: most bytes of tensors on a rank of it, simulated on its program.

        What `autopar.runtime.memory.measure_peak` measures there; the plan's own figure is for a GPU and its allocator.
        """
        compiled = self._ready("peak_bytes_per_stage")
        if not isinstance(compiled, CompiledStages):
            raise RuntimeFailure("peak_bytes_per_stage: the plan has no stages; read plan.predicted['peak_bytes']")
        return peak_bytes_per_stage(compiled)

    def explain(self) -> Any:
        """Why the program runs as it does: the report of its plan."""
        return self._ready("explain").plan.explain()

    def dump_folder(self, root: str | Path | None) -> Path | None:
        """Where the next plan is dumped: `root` for the first, a numbered folder in it for later shapes, on rank 0."""
        if root is None or (dist.is_initialized() and dist.get_rank() != 0):
            return None
        return Path(root) / str(len(self._compiled) + 1) if self._compiled else Path(root)

    @property
    def plan(self) -> Plan | None:
        """The plan in use; None before the first call."""
        return self._first.plan if self._first else None

    @property
    def data_shard(self) -> tuple[int, int]:
        """(index, count): which part of the batch this rank computes, for a sampler."""
        compiled = self._ready("data_shard")
        if isinstance(compiled, CompiledStages):
            raise RuntimeFailure(
                "data_shard: with stages every rank takes the global batch, of which each micro-batch is cut; give all "
                "ranks the same samples"
            )
        index, count = 0, 1
        for coordinate, size, role in zip(
            compiled.rank_program.coordinates, compiled.plan.mesh, compiled.plan.batch_axes(), strict=True
        ):
            if role:
                index, count = index * size + coordinate, count * size
        return index, count

    def _ready(self, what: str) -> Compiled | CompiledStages:
        if self._first is None:
            raise RuntimeFailure(f"{what} needs a plan: call the program once, or pass example_inputs to compile")
        return self._first

    # -- preparing -----------------------------------------------------------------

    def prepare(self, call: Call) -> Compiled | CompiledStages:
        """Plan and emit for this call's shapes, if that has not been done yet."""
        key = (_signature(call), self.training)
        if key not in self._compiled:
            model = self._model[0]
            mode = model.training
            model.train(self.training)
            try:
                fixed = self._first.params if self._first else None
                compiled = self._planner(model, call, fixed)
            finally:
                model.train(mode)
            if self._first is None:
                with naming_dead_ranks(compiled.mesh):
                    self._place_parameters(compiled)
                self._first = compiled
            self._compiled[key] = compiled
        return self._compiled[key]

    def _place_parameters(self, compiled: Compiled | CompiledStages) -> None:
        model_params = dict(self._model[0].named_parameters())
        with torch.no_grad():
            for fqn, param in self.named_parameters():
                source = model_params[fqn].detach()
                placed = nn.Parameter(compiled.place(fqn, source), requires_grad=param.requires_grad)
                if compiled.mesh is not None:
                    torch.utils.swap_tensors(param, placed)
        if isinstance(compiled, CompiledStages) and compiled.plan.named.offload == "optimizer":
            self._host_state = HostState.of(dict(self.named_parameters()))
            self._host_state.watch(self)

    def _buffer_values(self, trace: Trace) -> dict[str, torch.Tensor]:
        values = {b.node: self.get_buffer(b.fqn) for b in trace.buffers}
        for constant in trace.constants:
            value = constant.value if constant.fqn is None else operator.attrgetter(constant.fqn)(self._model[0])
            assert value is not None
            values[constant.node] = value
        return values

    def _wrap(self, compiled: Compiled, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in compiled.trace.whole_outputs or compiled.mesh is None:
            return tensor
        tensor, state = compiled.order.put(compiled.rank_program, name, tensor)
        return DTensor.from_local(tensor, compiled.mesh, torch_placements(state), run_check=False)


class _Step(torch.autograd.Function):
    """Ties the two emitted graphs into autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        compiled: Compiled,
        buffers: dict[str, torch.Tensor],
        inputs: dict[str, torch.Tensor],
        wait: bool,
        at_once: bool,
        *params: Any,
    ) -> tuple[torch.Tensor, ...]:
        """at_once: the backward pass puts gradients into `.grad` itself: autograd takes a tenth of a millisecond for
        each, a hundredth of a step of small models."""
        values = {p.node: local_detached(t) for p, t in zip(compiled.trace.params, params, strict=True)}
        values.update(buffers)
        values.update(inputs)
        with compiled.own_precision():
            outputs, saved = compiled.rank_program.forward(values, wait=wait)
        # Detached: an output that holds its own graph would never be freed. Changes in place are still seen.
        ctx.compiled, ctx.saved, ctx.values = compiled, [t.detach() for t in saved], values
        ctx.watched = {**values, **{p.node: t for p, t in zip(compiled.trace.params, params, strict=True)}}
        ctx.versions = {name: value._version for name, value in ctx.watched.items()}  # a DTensor counts, not its part
        ctx.saved_versions = [tensor._version for tensor in saved]
        ctx.names = compiled.rank_program.emitted.output_names
        ctx.own = list(params) if at_once else None
        differentiable = {o.node for o in compiled.trace.outputs if o.tangent is not None}
        ctx.mark_non_differentiable(*(t for n, t in zip(ctx.names, outputs, strict=True) if n not in differentiable))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        compiled: Compiled = ctx.compiled
        if ctx.saved is None:
            raise RuntimeError("backward was called twice on one forward pass; call the program again first")
        changed = [n for n, v in ctx.versions.items() if n in compiled.backward_needs and ctx.watched[n]._version != v]
        if changed:
            raise RuntimeError(f"{changed[0]} was changed in place between forward and backward")
        if [tensor._version for tensor in ctx.saved] != ctx.saved_versions:
            raise RuntimeError("a result of the program was changed in place before backward, which needs it; clone it")
        saved, ctx.saved = ctx.saved, None
        values, ctx.values, ctx.watched = ctx.values, None, None
        given = dict(zip(ctx.names, grad_outputs, strict=True))
        tangents = {o.tangent: given.pop(o.node, None) for o in compiled.trace.outputs if o.tangent and o.node}
        values.update({name: tangent(tensor, compiled.tangent_metas[name]) for name, tensor in tangents.items()})
        with naming_dead_ranks(compiled.mesh), compiled.own_precision():
            grads = compiled.rank_program.backward(saved, values)
        by_fqn = dict(zip(compiled.rank_program.emitted.grads, grads, strict=True))
        used = {name for name, tensor in tangents.items() if tensor is not None}
        for fqn in [name for name in by_fqn if not used & compiled.tangents_of[name]]:
            del by_fqn[fqn]  # what no loss was made of gives no gradient, as on one device
        made = [_as_gradient(compiled, p.fqn, by_fqn) for p in compiled.trace.params]
        if ctx.own is not None:
            accumulate(ctx.own, made)
            made, ctx.own = [None] * len(made), None
        return (None, None, None, None, None, *made)


def check_autocast(plan: Plan) -> None:
    """A program has the precision that it was compiled for; an autocast around it that asks for another is refused."""
    device_type = plan.cluster.device.kind
    if not torch.is_autocast_enabled(device_type):
        return
    dtype, precision = torch.get_autocast_dtype(device_type), plan.options.precision
    if dtype != autocast_dtype(precision):
        raise RuntimeFailure(
            f"the program was compiled for precision={precision!r} and is called under autocast to {dtype}; leave the "
            "autocast out, or compile with precision='bf16'"
        )


def _as_gradient(compiled: Compiled, fqn: str, grads: dict[str, torch.Tensor]) -> torch.Tensor | None:
    grad = grads.pop(fqn, None)
    if grad is None or compiled.mesh is None:
        return grad
    layout = (fqn, grad.shape, grad.stride(), grad.dtype)
    make = compiled.gradient_makers.get(layout)
    if make is not None and not grad.requires_grad:
        return make(grad)
    placements = torch_placements(compiled.plan.decisions.params[fqn])
    made = DTensor.from_local(grad, compiled.mesh, placements, run_check=False)
    compiled.gradient_makers[layout] = dtensor_maker(made)
    return made


def _loss_of(result: Any) -> torch.Tensor:
    """The loss among what the model returns: the only leaf with a gradient function."""
    leaves = pytree.tree_leaves(result)
    return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad)


def _signature(call: Call) -> tuple[object, ...]:
    """What decides whether a call can use the same plan: structure, shapes, dtypes and constants."""
    leaves, spec = pytree.tree_flatten(call)
    kinds = tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in leaves)
    return (kinds, str(spec))
