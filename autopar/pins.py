"""What the user fixed, turned into filters on the planner's choices.

A pin is one of
  * a layout key with a degree or flag: {"tp": 4, "dp": 2, "zero": 3, "sp": True, "recompute": "none"},
    several axes of one role, {"tp": (2, 2)}, or {"mesh": [2, 4]} for the bare shape;
  * a pattern of parameter or module names with placements, one per mesh axis:
    {"layers.*.mlp.up_proj.weight": ("R", "S(0)")};
  * a pattern of module names with "keep", "recompute" or "offload".
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from autopar.cost.compute import OpClass, op_class
from autopar.dataflow import Operand, is_backward, module_path, resolve, result_metas
from autopar.errors import PinError
from autopar.experts import ExpertSide
from autopar.grouping import FROM_GROUPS, TO_GROUPS, is_grouped_product
from autopar.pin_mesh import ROLES, UNSUPPORTED, degree, on_context, pinned_mesh
from autopar.pin_sequence import allow_context, holds_sequences_whole, lead_of
from autopar.pin_stream import Stream
from autopar.pin_vocabulary import holds_vocabulary_whole
from autopar.placements import PARTIAL, State, in_groups, is_dealt, is_placement, shard_dim, shard_runs
from autopar.rules import AxisRule, operands
from autopar.segments import block_of
from autopar.sharding import ChoiceFilter, OpOption, Pins
from autopar.trace import ParamInfo, Trace

WAITING = ("keep", "recompute", "offload")  # what a module's activations may be pinned to
_FLAGS = ("zero", "sp", "recompute", "mesh", "expert_dispatch")
# How tokens come to experts on the axes "ep": by all-to-all, or they are there; "data": by all-to-all, and all else
# runs as on data ranks, as a layout by degrees has it.
_DISPATCH = ("exchange", "local", "data")
MESH_KEYS = frozenset({*ROLES, "mesh"})  # pins that fix the mesh


@dataclass(frozen=True)
class PinRequest:
    """A checked pin dict.

    mesh: the mesh shape if it is fixed; roles: per axis "dp", "cp", "ep", "tp" or None.
    """

    mesh: tuple[int, ...] | None
    roles: tuple[str | None, ...]
    zero: int | None = None
    sequence_parallel: bool | None = None
    recompute: str | None = None
    expert_dispatch: str | None = None
    experts_on_context: bool = False  # the axes "cp" cut the experts, too
    params: tuple[tuple[str, State], ...] = ()
    modules: tuple[tuple[str, str], ...] = ()

    @property
    def expert_role(self) -> str:
        """What the axes that cut experts are called."""
        return "cp" if self.experts_on_context else "ep"

    @property
    def empty(self) -> bool:
        """Whether nothing is pinned."""
        return self == PinRequest(None, ())


@dataclass(frozen=True)
class Forbidden:
    """Decisions that a search must not take again: states by parameter, rules (one per mesh axis) by op.

    An op that has no other rule keeps it.
    """

    params: Mapping[str, State] = field(default_factory=dict)
    ops: Mapping[str, tuple[AxisRule, ...]] = field(default_factory=dict)

    def added_to(self, pins: Pins) -> Pins:
        """The filters of `pins` and these."""
        allowed = pins.allow_param
        return replace(
            pins,
            allow_param=lambda p, s: self.params.get(p.fqn) != s and (allowed is None or allowed(p, s)),
            avoid_options=(*pins.avoid_options, lambda node, option: self.ops.get(node.name) == option.rules),
        )


def parse_pins(pin: Mapping[str, Any] | None, devices: int) -> PinRequest:
    """Check a pin dict for a number of devices; raises PinError."""
    degrees, flags, params, modules = {}, {}, [], []
    for key, value in (pin or {}).items():
        if key in ROLES or key in UNSUPPORTED:
            degrees[key] = degree(key, value)
        elif key in _FLAGS:
            flags[key] = value
        elif value in WAITING:
            modules.append((key, value))
        else:
            params.append((key, _placements(key, value)))
    mesh, roles = pinned_mesh(degrees, flags.get("mesh"), devices)
    for key, placements in params:
        if mesh is not None and len(placements) != len(mesh):
            raise PinError(f"pin {key!r} has {len(placements)} placements for a mesh of {len(mesh)} axes {mesh}")
    zero, recompute = flags.get("zero"), flags.get("recompute")
    if zero is not None and zero not in (0, 1, 2, 3):
        raise PinError(f"pin 'zero' must be 0, 1, 2 or 3, got {zero!r}")
    if recompute is not None and recompute not in ("none", "selective", "full"):
        raise PinError(f"pin 'recompute' must be none, selective or full, got {recompute!r}")
    dispatch = flags.get("expert_dispatch")
    together = mesh is not None and on_context(degrees, devices)
    if dispatch is not None and (dispatch not in _DISPATCH or not ("ep" in roles or together)):
        words = "exchange, local or data"
        raise PinError(f"pin 'expert_dispatch' must be {words}, beside a pinned ep, got {dispatch!r}")
    sp = flags.get("sp")
    return PinRequest(mesh, roles, zero, sp, recompute, dispatch, together, tuple(params), tuple(modules))


def _placements(key: str, value: Any) -> State:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (tuple, list)) or not all(isinstance(i, str) and is_placement(i) for i in items):
        raise PinError(
            f"pin {key!r}: expected a layout key ({', '.join((*ROLES, *_FLAGS))}), placements such as "
            f"('R', 'S(0)'), 'keep', 'recompute' or 'offload', got {value!r}"
        )
    for item in items:
        if item == PARTIAL or in_groups(item) or is_dealt(item):
            raise PinError(f"pin {key!r}: a parameter cannot be stored as {item!r}")
    return tuple(items)


def resolve_pins(request: PinRequest, trace: Trace, mesh: tuple[int, ...]) -> Pins:
    """The filters that a request puts on the problem of `trace` on `mesh`."""
    lead = lead_of(trace)
    asked = request.sequence_parallel and "tp" in request.roles
    stream = Stream.of(trace, request.roles, mesh, lead) if asked and lead is not None else None
    return Pins(
        allow_option=_option_filter(request, trace, mesh),
        avoid_options=(*_avoided(request, trace), *(() if stream is None else (stream.is_held_whole,))),
        allow_param=_param_filter(request, trace, mesh),
        recompute=_recompute_filter(request, trace),
        fleeting=None if stream is None else stream.is_gathered,
    )


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern names a path or any run of its parts ("layers.0" in "model.layers.0.mlp")."""
    parts = path.split(".")
    inner = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
    return any(fnmatchcase(name, pattern) for name in inner)


def _near(pattern: str, names: set[str]) -> str:
    """Up to three of the names that are most like a pattern."""
    near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.3)
    return ", ".join(near or sorted(names)[:3])


def _param_filter(
    request: PinRequest, trace: Trace, mesh: tuple[int, ...]
) -> Callable[[ParamInfo, State], bool] | None:
    for pattern, _ in request.params:
        if not any(_matches(pattern, name) for p in trace.params for name in (p.fqn, *p.tied)):
            near = _near(pattern, {p.fqn for p in trace.params})
            raise PinError(f"pin {pattern!r} names no parameter of the model; near: {near}")
    expert_role = request.expert_role if request.experts_on_context or request.expert_dispatch == "data" else None
    expert_axes = [a for a, role in enumerate(request.roles) if expert_role and role == expert_role]
    data_axes = [a for a, role in enumerate(request.roles) if role in ("dp", "cp") and a not in expert_axes]
    experts = ExpertSide.of(trace).values if expert_axes else frozenset()
    if not request.params and not expert_axes and (request.zero is None or not data_axes):
        return None

    def allow(param: ParamInfo, state: State) -> bool:
        for pattern, wanted in request.params:
            if any(_matches(pattern, name) for name in (param.fqn, *param.tied)):
                return state == wanted
        of_experts = param.node in experts
        if of_experts and any(state[a] != "S(0)" for a in expert_axes):
            return False
        if request.zero is None:
            return True
        axes = data_axes if of_experts else [*data_axes, *expert_axes]
        cut = [shard_dim(state[a]) is not None for a in axes]
        can_cut = any(size % math.prod(mesh[a] for a in axes) == 0 for size in param.shape[of_experts:])
        return not any(cut) if request.zero == 0 or not can_cut else all(cut)

    return allow


def _recompute_filter(request: PinRequest, trace: Trace) -> Callable[[fx.Node], str | None] | None:
    paths = {module_path(n) for n in trace.graph_module.graph.nodes if not is_backward(n)}
    for pattern, _ in request.modules:
        if not any(_matches(pattern, path) for path in paths if path):
            near = _near(pattern, paths - {""})
            raise PinError(f"pin {pattern!r} names no module of the model that computes something; near: {near}")
    if not request.modules and request.recompute in (None, "selective"):
        return None
    blocks = any(block_of(path) for path in paths)

    def wanted(node: fx.Node) -> str | None:
        for pattern, what in request.modules:
            if _matches(pattern, module_path(node)):
                return what
        if request.recompute == "full":  # of the repeated layers, where there are any
            return "recompute" if block_of(module_path(node)) or not blocks else None
        return "keep" if request.recompute == "none" else None

    return wanted


def weight_slots(node: fx.Node, trace: Trace) -> list[int]:
    """Which operands of a matrix product, convolution or lookup are weights (parameters of two or more dims)."""
    kinds = (OpClass.MATMUL, OpClass.CONVOLUTION)
    if op_class(node.target) not in kinds and node.target is not torch.ops.aten.embedding.default:
        return []
    params = {p.node for p in trace.params}
    slots = []
    for slot, operand in enumerate(resolve(o) for o in operands(node)):
        source = _through_casts(operand)
        if source.node.name in params and len(source.base_tensor.shape) >= 2:
            slots.append(slot)
    return slots


def _through_casts(operand: Operand) -> Operand:
    while operand.node.target is torch.ops.aten._to_copy.default:
        operand = resolve(operands(operand.node)[0])
    return operand


def _option_filter(
    request: PinRequest, trace: Trace, mesh: tuple[int, ...]
) -> Callable[[fx.Node, OpOption], bool] | None:
    if not any(request.roles):
        return None
    _check_experts(request, trace, mesh)
    slots_of = {n: weight_slots(n, trace) for n in trace.graph_module.graph.nodes if n.op == "call_function"}
    lead = lead_of(trace)

    def allow(node: fx.Node, option: OpOption) -> bool:
        for axis, role in enumerate(request.roles):
            if role == "tp" and not _allow_tensor(node, option, axis, slots_of.get(node, []), lead, request):
                return False
            if role == "dp" and not _allow_data(option, axis, slots_of.get(node, [])):
                return False
            on_experts = role == "cp" and request.experts_on_context and is_grouped_product(node)
            if role == "cp" and not on_experts and not allow_context(node, option, axis, slots_of.get(node, []), lead):
                return False
            if role == "cp" and request.experts_on_context and not _allow_experts(node, option.rules[axis], "data"):
                return False
            if role == "ep" and not _allow_experts(node, option.rules[axis], request.expert_dispatch):
                return False
            as_data = role == "ep" and request.expert_dispatch == "data" and not is_grouped_product(node)
            if as_data and not _allow_data(option, axis, slots_of.get(node, [])):
                return False
        return True

    return allow


def _avoided(request: PinRequest, trace: Trace) -> tuple[ChoiceFilter, ...]:
    """On context axes, options with whole sequences; on tensor axes, those with the whole vocabulary in a loss."""
    lead = lead_of(trace)
    if lead is None:
        return ()
    context, tensor = ([a for a, role in enumerate(request.roles) if role == kind] for kind in ("cp", "tp"))
    params, found = {p.node for p in trace.params}, []
    if context:
        found.append(lambda node, option: any(holds_sequences_whole(node, option, a, lead, params) for a in context))
    if tensor:
        found.append(lambda node, option: any(holds_vocabulary_whole(node, option, a, lead) for a in tensor))
    return tuple(found)


def _check_experts(request: PinRequest, trace: Trace, mesh: tuple[int, ...]) -> None:
    """That there are experts, and as many for each rank as for any other."""
    role_of = request.expert_role
    parts = math.prod(size for size, role in zip(mesh, request.roles, strict=True) if role == role_of)
    if parts == 1:
        return
    products = [n for n in trace.graph_module.graph.nodes if n.op == "call_function" and is_grouped_product(n)]
    if not products:
        raise PinError(
            f"pin ep={parts}: the model has no grouped products over experts; a model of transformers has them with "
            'config._experts_implementation = "grouped_mm"'
        )
    for node in products:
        experts = next(int(o.meta["val"].shape[0]) for o in operands(node) if o.meta["val"].dim() != 2)
        if experts % parts:
            raise PinError(f"pin ep={parts}: {experts} experts cannot be spread evenly; choose a divisor of {experts}")


def _allow_tensor(
    node: fx.Node,
    option: OpOption,
    axis: int,
    slots: list[int],
    lead: tuple[int, ...] | None,
    request: PinRequest,
) -> bool:
    """Tensor parallel axis: weights are used in parts; the batch (and without sp the sequence) is not cut."""
    if any(shard_dim(option.operand_states[slot][axis]) is None for slot in slots):
        return False
    for tensor, state in zip(result_metas(node), option.result_states, strict=True):
        if tensor is None or state is None or lead is None or tuple(tensor.shape[:2]) != lead:
            continue
        dim = shard_dim(state[axis])
        if dim == 0 or (dim == 1 and request.sequence_parallel is False):
            return False
    return True


def _allow_experts(node: fx.Node, rule: AxisRule, dispatch: str | None) -> bool:
    """Expert parallel axis: products are of a rank's own experts; moves to them as asked for."""
    if is_grouped_product(node):
        return rule.lowering == "expert_rows"
    if dispatch is None or node.target not in (TO_GROUPS, FROM_GROUPS):
        return True
    return (rule.inputs[2] == PARTIAL) == (dispatch != "local")


def _allow_data(option: OpOption, axis: int, slots: list[int]) -> bool:
    """Data parallel axis: weights are used whole, the work is cut along the activations."""
    if not slots:
        return True
    others = [s for i, s in enumerate(option.operand_states) if i not in slots]
    whole = all(option.operand_states[slot][axis] == "R" for slot in slots)
    return whole and any(shard_dim(s[axis]) is not None and shard_runs(s[axis]) == 1 for s in others)
