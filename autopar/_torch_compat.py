"""Every use of torch's private API, in one place.

Tested with torch 2.13.0. These thin functions hide how torch spells what is used: a new release means one file to see.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
import torch.fx.traceback
from torch._dynamo.exc import TorchDynamoException as TorchDynamoException
from torch._dynamo.functional_export import dynamo_graph_capture_for_export
from torch._functorch._aot_autograd.descriptors import BufferAOTInput as BufferAOTInput
from torch._functorch._aot_autograd.descriptors import GradAOTOutput as GradAOTOutput
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput as InputMutationAOTOutput
from torch._functorch._aot_autograd.descriptors import ParamAOTInput as ParamAOTInput
from torch._functorch._aot_autograd.descriptors import PlainAOTInput as PlainAOTInput
from torch._functorch._aot_autograd.descriptors import PlainAOTOutput as PlainAOTOutput
from torch._functorch._aot_autograd.descriptors import TangentAOTInput as TangentAOTInput
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedOperatorException as UnsupportedOperatorException
from torch.distributed._local_tensor import LocalIntNode, LocalTensor, LocalTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store, _resolve_process_group
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._op_schema import OpSchema, OpSpec, OpStrategy, TupleStrategy
from torch.distributed.tensor._ops.single_dim_strategy import _ShardingPlaceholder
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.utils import _pytree as _torch_pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

pytree = _torch_pytree  # registered by transformers for its outputs
resolve_process_group = _resolve_process_group
register_work: Callable[..., Any] = torch._C._distributed_c10d._register_work  # wait_tensor(x) waits for it, too
default_store: Callable[[], Any] = _get_default_store  # the key-value store of the running process group
# x @ weight.T + bias by oneDNN, called with (x, weight, bias, "none", [], ""); None where torch was built without it
onednn_linear: Any = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
CHECK_OF_VALUES: Callable[..., None] = torch._check_tensor_all  # raises where an element is false: in transformers

# --- Capture: Dynamo and AOTAutograd (used by autopar.tracing only) ----------------------

_CAPTURE_DYNAMO_CONFIG: dict[str, Any] = {
    "assume_static_by_default": True,
    "automatic_dynamic_shapes": False,
    "allow_rnn": True,  # nn.LSTM and its like come out as ordinary ops
    "specialize_int": True,
    "specialize_float": True,
    "capture_scalar_outputs": False,
    "capture_dynamic_output_shape_ops": False,
    "suppress_errors": False,
    "verbose": False,
}


def fake_tensor_mode() -> FakeTensorMode:
    """A fake mode that also takes real constant tensors (a list of tensors held by a module, `torch.tensor(...)`)."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_plain_tensor(tensor: torch.Tensor) -> bool:
    """Whether a tensor is an ordinary dense one: real, meta or fake, but of no other subclass."""
    kinds = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)
    return type(tensor) in kinds and tensor.layout == torch.strided and not tensor.is_nested


def has_device(kind: str) -> bool:
    """Whether autograd can run fake tensors of a device type: the backend must be built in (no device need be there).

    Without it torch aborts the process (seen in 2.13: "not linked with support for cuda devices").
    """
    if kind == "cuda":
        return torch.backends.cuda.is_built()
    accelerator = torch.accelerator.current_accelerator()
    return kind == "cpu" or (accelerator is not None and accelerator.type == kind)


def is_fake_tensor(tensor: object) -> bool:
    """Whether a tensor is a fake one: shapes and dtype, no values."""
    return isinstance(tensor, FakeTensor)


@contextlib.contextmanager
def capture_environment(ignored_calls: set[Callable[..., Any]]) -> Iterator[None]:
    """The process-wide state a capture wants, put back at the end.

    Static shapes, gradients on, no autocast, no ambient dispatch modes, an empty Dynamo cache before and after, calls
    to `ignored_calls` (logging) left out of the graph, no code written for graphs that nobody calls, no source files
    read for the names in a log that is off, and torch's own error log kept quiet: its text goes into the exception.
    """
    fake_log = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled = fake_log.disabled
    ignored = set(torch._dynamo.config.ignore_logging_functions) | ignored_calls
    torch._dynamo.reset()
    try:
        fake_log.disabled = True
        with (
            _disable_current_modes(),
            torch._dynamo.config.patch({**_CAPTURE_DYNAMO_CONFIG, "ignore_logging_functions": ignored}),
            torch.enable_grad(),
            _use_lazy_graph_module(True),
            patch.object(torch._dynamo.symbolic_convert, "get_funcname", lambda *_: None),
        ):
            yield
    finally:
        fake_log.disabled = was_disabled
        torch._dynamo.reset()


def capture_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.GraphModule:
    """Dynamo's graph of `module.forward`: called through `fx.Interpreter` it takes the leaves of args and kwargs
    and returns what the module returns. Parameters are those of `module`."""
    return dynamo_graph_capture_for_export(module)(*args, **kwargs)


def graph_module(root: torch.nn.Module, graph: torch.fx.Graph, class_name: str) -> torch.fx.GraphModule:
    """A GraphModule that writes the code of its graph when it is first called, if ever: most graphs are only read."""
    return _LazyGraphModule(root, graph, class_name)


def export_joint(
    module: torch.nn.Module, flat_args: tuple[torch.Tensor, ...], mode: FakeTensorMode
) -> torch.fx.GraphModule:
    """The joint forward and backward graph of `module`, functional, with descriptors in `meta["desc"]`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        return aot_export_joint_with_descriptors(stack, module, flat_args).graph_module


@contextlib.contextmanager
def recorded_node_meta() -> Iterator[None]:
    """While a graph is interpreted: carry each node's metadata to the ATen nodes made from it, backward included."""
    with torch.fx.traceback.preserve_node_meta(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
        with torch.autograd.detect_anomaly(check_nan=False):
            yield


# --- DTensor's sharding rules (used by autopar.rules) ------------------------------------
# Tested with torch 2.13. `ShardingPropagator.op_single_dim_strategy_funcs` and
# `.op_strategy_funcs` are the registries; neither is public.

_SUM, _AVG = "P", "avg"


@cache
def _mesh_without_group(size: int) -> DeviceMesh:
    """A 1-D mesh that only has a size: no process group is made, looked up or needed."""
    return DeviceMesh("cpu", torch.arange(size), _init_backend=False, _rank=0)


def _placement_name(placement: object) -> str | None:
    """ "R", "S(d)", "P" or "avg"; None for what autopar has no word for (strided shards, max, masks)."""
    if isinstance(placement, _ShardingPlaceholder) or type(placement) is Shard:
        return f"S({placement.dim})"
    if isinstance(placement, Replicate):
        return "R"
    if type(placement) is Partial:
        return {"sum": _SUM, "avg": _AVG}.get(placement.reduce_op)
    return None


def _placement(name: str) -> Replicate | Shard:
    return Replicate() if name == "R" else Shard(int(name[2:-1]))


def static_size(size: int | torch.SymInt) -> int | None:
    """A size as a number: Dynamo leaves sizes that it fixed as SymInts. None if it is really symbolic."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size


def _meta(tensor: torch.Tensor) -> TensorMeta:
    return TensorMeta(torch.Size(map(int, tensor.shape)), tuple(map(int, tensor.stride())), tensor.dtype)


def dtensor_rules(
    op: OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Sequence[torch.Tensor | None],
    axis_size: int,
) -> list[tuple[tuple[str, ...], tuple[str | None, ...]]] | None:
    """What DTensor says about `op` on one mesh axis, as (input placements, output placements).

    args, kwargs: as in the graph, with (fake) tensors in place of nodes. Placements are
    "R", "S(d)", "P" (sum), and "avg" (outputs only); what cannot be said so is left out.
    None if DTensor has no rule for the op.
    """
    propagator = DTensor._op_dispatcher.sharding_propagator
    inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    single = propagator.op_single_dim_strategy_funcs.get(op)
    if single is not None:
        return _single_dim_rules(single, op, args, kwargs, len(inputs), outputs)
    strategy = propagator.op_strategy_funcs.get(op)
    if strategy is None:
        return None
    info = propagator.op_to_schema_info.get(op)
    found: dict[tuple[tuple[str, ...], tuple[str | None, ...]], None] = {}
    for request in _requests(inputs, axis_size):
        specs = _strategies(strategy, op, args, kwargs, request, info, axis_size)
        for spec in specs:
            rule = _rule_of(spec, request, len(outputs))
            if rule is not None:
                found[rule] = None
        if len(specs) > 1:
            break  # the op lists all its strategies whatever it is asked
    return list(found)


def _single_dim_rules(
    info: Any,
    op: OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inputs: int,
    outputs: Sequence[torch.Tensor | None],
) -> list[tuple[tuple[str, ...], tuple[str | None, ...]]]:
    metas = tree_map_only(torch.Tensor, _meta, (args, kwargs))
    rules = []
    for row in getattr(info, "func", info)(op, *metas):
        if len(row) != len(outputs) + inputs:
            continue
        made = tuple(None if p is None else _placement_name(p) for p in row[: len(outputs)])
        taken = tuple(_placement_name(p) for p in row[len(outputs) :])
        complete = all((m is None) == (o is None) for m, o in zip(made, outputs, strict=True))
        if complete and None not in taken:
            rules.append((taken, made))
    return rules  # type: ignore[return-value]


def _requests(inputs: Sequence[torch.Tensor], axis_size: int) -> Iterator[tuple[str, ...]]:
    """Input placements to ask about: every combination of few inputs, else one dim cut in all or in one of them."""
    options = [["R", *(f"S({d})" for d, n in enumerate(t.shape) if n and n % axis_size == 0)] for t in inputs]
    if math.prod(len(o) for o in options) <= 64:
        yield from itertools.product(*options)
        return
    whole = ("R",) * len(inputs)
    yield whole
    for cut in dict.fromkeys(p for o in options for p in o[1:]):
        yield tuple(cut if cut in o else "R" for o in options)
        for i, option in enumerate(options):
            if cut in option:
                yield (*whole[:i], cut, *whole[i + 1 :])


def _strategies(
    strategy: Callable[[OpSchema], Any],
    op: OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    request: tuple[str, ...],
    info: Any,
    axis_size: int,
) -> list[OpSpec]:
    """The strategies for operands placed as requested; none where DTensor refuses the request."""
    mesh = _mesh_without_group(axis_size)
    placements = iter(request)

    def wrap(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            spec = DTensorSpec(mesh, (_placement(next(placements)),), tensor_meta=_meta(value))
            return OpStrategy([OpSpec(spec)])
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            items = [wrap(v) for v in value]
            return TupleStrategy(items) if all(isinstance(v, torch.Tensor) for v in value) else items
        return value

    schema = OpSchema(op, tuple(wrap(a) for a in args), {k: wrap(v) for k, v in kwargs.items()}, info)
    try:
        found = strategy(schema)
    except Exception:  # DTensor refuses in many ways: KeyError, RuntimeError, AssertionError, ...
        return []
    return found.strategies if isinstance(found, OpStrategy) else []


def _rule_of(
    spec: OpSpec, request: tuple[str, ...], outputs: int
) -> tuple[tuple[str, ...], tuple[str | None, ...]] | None:
    made = spec.output_specs if isinstance(spec.output_specs, (tuple, list)) else (spec.output_specs,) * outputs
    if len(made) != outputs:
        return None
    names = tuple(None if s is None else _placement_name(s.placements[0]) for s in made)
    if any(n is None and s is not None for n, s in zip(names, made, strict=True)):
        return None
    # No input_specs means: all inputs lie as the (only) output does.
    sources = spec.input_specs if spec.input_specs is not None else (made[0],) * len(request)
    taken = tuple(None if s is None else _placement_name(s.placements[0]) for s in sources)
    if None in taken or len(taken) != len(request):
        return None
    return taken, names  # type: ignore[return-value]


# --- Execution and simulation (used by autopar.codegen, .runtime and .verification) -------


def boxed_codegen() -> Any:
    """The fx code generator whose function takes one list and empties it, so that inputs can be freed early."""
    from torch.fx.graph import _BoxedCodeGen

    return _BoxedCodeGen()


def dtensor_maker(like: DTensor) -> Callable[[torch.Tensor], DTensor]:
    """What `DTensor.from_local` does for more local tensors of this layout that need no gradient, ten times faster."""
    return partial(DTensor, spec=like._spec, requires_grad=False)


def local_detached(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor (an ordinary tensor itself), detached: the same memory and version counter."""
    return tensor._local_tensor.detach() if isinstance(tensor, DTensor) else tensor.detach()


def schedule_runtime() -> tuple[Any, Any, Any]:
    """torch's runtime of pipeline schedules: (its class, actions, their kinds). What fails is raised, not logged."""
    from torch.distributed.pipelining import schedules

    schedules.logger.setLevel(logging.CRITICAL)
    return schedules._PipelineScheduleRuntime, schedules._Action, schedules._ComputationType


def local_tensor(parts: dict[int, torch.Tensor]) -> torch.Tensor:
    """One tensor that stands for the local tensors of all simulated ranks."""
    return LocalTensor(parts)


def local_parts(tensor: torch.Tensor) -> dict[int, torch.Tensor] | None:
    """The local tensors behind a simulated tensor; None for an ordinary one."""
    return getattr(tensor, "_local_tensors", None)


@contextlib.contextmanager
def simulated_mesh(mesh: tuple[int, ...]) -> Iterator[tuple[Sequence[str], list[Any]]]:
    """All ranks of a mesh in this process: yields the group name and the rank-dependent coordinate of each axis.

    Uses torch's LocalTensorMode on the "fake" backend; needs that no process group exists yet, and leaves none.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = math.prod(mesh)
    torch.distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        with LocalTensorMode(world):
            device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=tuple(f"x{i}" for i in range(len(mesh))))
            groups = [device_mesh.get_group(axis).group_name for axis in range(len(mesh))]
            strides = [math.prod(mesh[axis + 1 :]) for axis in range(len(mesh))]
            coordinates = [
                torch.SymInt(LocalIntNode({r: r // stride % size for r in range(world)}))
                for size, stride in zip(mesh, strides, strict=True)
            ]
            yield groups, coordinates
    finally:
        torch.distributed.destroy_process_group()


def peak_bytes_by_device(step: Callable[[], object], externals: Sequence[object]) -> dict[torch.device, int]:
    """The highest total of bytes alive per device while `step` runs, by torch's own tracker.

    externals: modules, optimizers and tensors that exist before it and count as well. Counted are storages that
    operators return; what an operator uses inside itself is not seen.
    """
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(*externals)  # type: ignore[arg-type]
    with tracker:
        step()
    return {device: snapshot["Total"] for device, snapshot in tracker.get_tracker_snapshot("peak").items()}


def simulate_exchange(library: torch.library.Library, name: str, run: Callable[..., list[torch.Tensor]]) -> None:
    """How simulated ranks exchange in a group, the last argument of an op: from its members' tensors, by argument."""

    def rule(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        found: dict[int, torch.Tensor] = {}
        first = torch.distributed.get_process_group_ranks(resolve_process_group(args[-1]))
        for base in (r for r in mode.ranks if r // (first[1] - first[0]) % len(first) == 0):
            with mode.disable():
                group = [base + rank - first[0] for rank in first]
                given = ([a._local_tensors[rank] for rank in group] for a in args if isinstance(a, LocalTensor))
                found |= zip(group, run(*given), strict=True)
        return LocalTensor(found)

    library._register_torch_dispatch_rule(name, LocalTensorMode, rule)
