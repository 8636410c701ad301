"""What flows where in a joint graph: base values, the views of them, and who uses them.

Views (transpose, view, slice, ...) cost nothing and own no memory, so neither the
planner nor the memory model treats them as values. Every operand of a real op is a
*base value* seen through a chain of views, and states are decided for base values only.
A view is emitted wherever it is used. This loses no plan: a conversion of a view's
result can be made on its base, at the same number of bytes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from autopar._torch_compat import OpOverload
from autopar.placements import Fold, Placement, State, local_shape
from autopar.rules import axis_rules, is_view, operands

if TYPE_CHECKING:
    from autopar.tracing.types import ParamInfo, Trace

ValueName = str

_KEPT = "_dataflow"


def value_name(node: fx.Node, index: int = 0) -> ValueName:
    """The name of result `index` of a node."""
    return node.name if index == 0 else f"{node.name}#{index}"


def result_metas(node: fx.Node) -> tuple[torch.Tensor | None, ...]:
    """The fake tensors a node makes, one per result; None for results that do not exist."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, (tuple, list)):
        return tuple(v if isinstance(v, torch.Tensor) else None for v in value)
    return ()


@dataclass(frozen=True)
class View:
    """One link of a chain of views: result `index` of `node`, seen through operand 0."""

    node: fx.Node
    index: int


@dataclass(frozen=True)
class Operand:
    """A base value (result `index` of `node`) seen through `views`, innermost first."""

    node: fx.Node
    index: int
    views: tuple[View, ...]

    @property
    def value(self) -> ValueName:
        """The name of the base value."""
        return value_name(self.node, self.index)

    @property
    def tensor(self) -> torch.Tensor:
        """The fake tensor at the end of the chain."""
        node, index = (self.views[-1].node, self.views[-1].index) if self.views else (self.node, self.index)
        tensor = result_metas(node)[index]
        assert tensor is not None
        return tensor

    @property
    def base_tensor(self) -> torch.Tensor:
        """The fake tensor of the base value."""
        tensor = result_metas(self.node)[self.index]
        assert tensor is not None
        return tensor


def resolve(node: fx.Node) -> Operand:
    """The base value behind a node's (single) tensor result, and the views in between."""
    views: list[View] = []
    index = 0
    while True:
        if node.target is operator.getitem:
            index, node = int(node.args[1]), node.args[0]  # type: ignore[arg-type,assignment]
            continue
        if not is_view_node(node):
            return Operand(node, index, tuple(reversed(views)))
        views.append(View(node, index))
        index, node = 0, operands(node)[0]


def is_view_node(node: fx.Node) -> bool:
    """Whether a node is a pure view of its one tensor operand."""
    return node.op == "call_function" and isinstance(node.target, OpOverload) and is_view(node.target)


def is_real_op(node: fx.Node) -> bool:
    """Whether a node computes something: not a view, not a getitem, not a placeholder or the output."""
    return node.op == "call_function" and node.target is not operator.getitem and not is_view_node(node)


class ViewMaps:
    """How states travel through views on one mesh; caches the rules per axis. fold: see `rules.axis_rules`."""

    def __init__(self, mesh: tuple[int, ...], fold: Fold | None = None) -> None:
        self.mesh, self.fold = mesh, fold
        self._cache: dict[tuple[fx.Node, int, int], dict[Placement, Placement]] = {}

    def forward(self, operand: Operand, base_state: State) -> State | None:
        """The state at the end of the chain if the base value is in `base_state`; None if a view cannot follow."""
        state = base_state
        for view in operand.views:
            moved = tuple(self._map(view, size).get(p) for p, size in zip(state, self.mesh, strict=True))
            if None in moved:
                return None
            state = moved  # type: ignore[assignment]
            if not self._divides(view, state):
                return None
        return state

    def preimages(self, operand: Operand, base_states: tuple[State, ...]) -> dict[State, State]:
        """For each state that can be had at the end of the chain, a base state that gives it."""
        found: dict[State, State] = {}
        for base in base_states:
            state = self.forward(operand, base)
            if state is not None:
                found.setdefault(state, base)
        return found

    def _divides(self, view: View, state: State) -> bool:
        tensor = result_metas(view.node)[view.index]
        return tensor is not None and local_shape(tensor.shape, state, self.mesh) is not None

    def _map(self, view: View, size: int) -> dict[Placement, Placement]:
        key = (view.node, view.index, size)
        if key not in self._cache:
            mapping: dict[Placement, Placement] = {}
            for rule in axis_rules(view.node, size, self.fold).rules:
                result = rule.outputs[view.index]
                if result is not None and rule.lowering == "local":
                    mapping.setdefault(rule.inputs[0], result)
            self._cache[key] = mapping
        return self._cache[key]


@dataclass(frozen=True)
class Use:
    """One operand of one real op (or of the graph's output)."""

    user: fx.Node
    slot: int
    operand: Operand


class Dataflow:
    """The base values and uses of one joint graph.

    ops: real ops in order. operands_of: resolved operands per real op.
    """

    @staticmethod
    def of(trace: Trace) -> Dataflow:
        """Of a trace's graph, read once: everything from costs to emission asks for it, and traces do not change."""
        known = trace.__dict__.get(_KEPT)
        if known is None:
            known = Dataflow(trace.graph_module.graph)
            object.__setattr__(trace, _KEPT, known)  # beside the fields: two traces are as equal as before
        assert isinstance(known, Dataflow)
        return known

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.placeholders = tuple(n for n in graph.nodes if n.op == "placeholder")
        self.ops = tuple(n for n in graph.nodes if is_real_op(n))
        self.operands_of: dict[fx.Node, tuple[Operand, ...]] = {
            n: tuple(resolve(o) for o in operands(n)) for n in self.ops
        }

    @cached_property
    def uses(self) -> dict[ValueName, tuple[Use, ...]]:
        """All uses by real ops, per base value."""
        found: dict[ValueName, list[Use]] = {}
        for use in self._iter_uses():
            found.setdefault(use.operand.value, []).append(use)
        return {name: tuple(uses) for name, uses in found.items()}

    def _iter_uses(self) -> Iterator[Use]:
        for op in self.ops:
            for slot, operand in enumerate(self.operands_of[op]):
                yield Use(op, slot, operand)


def gradient_values(flow: Dataflow, gradient_nodes: Iterable[str]) -> frozenset[ValueName]:
    """Base values that are nothing but gradients: no op uses them."""
    nodes = {n.name: n for n in flow.graph.nodes}
    values = {resolve(nodes[name]) for name in gradient_nodes}
    return frozenset(o.value for o in values if o.node.op == "call_function" and o.value not in flow.uses)


# Ops of which each result element is an operand's, or a sum of operands'; and products with a plain number.
_CARRIERS = frozenset(
    {
        "aten._to_copy", "aten.clone", "aten.neg", "aten.add", "aten.sub", "aten.cat", "aten.stack",
        "aten.slice_backward", "aten.select_backward", "aten.constant_pad_nd",
    }
)  # fmt: skip
_PRODUCTS = frozenset({"aten.mul", "aten.div"})


def narrow_gradients(flow: Dataflow, gradient_nodes: Iterable[str]) -> frozenset[ValueName]:
    """Base values that become gradients of a wider dtype (bfloat16 on the way to float32).

    Their summands must not be summed over ranks before they are widened.
    """
    nodes = {n.name: n for n in flow.graph.nodes}
    found: set[ValueName] = set()
    for name in gradient_nodes:
        gradient = resolve(nodes[name])
        width = gradient.base_tensor.element_size()
        stack, seen = [gradient], {gradient.value}
        while stack:
            operand = stack.pop()
            if operand.base_tensor.element_size() < width:
                found.add(operand.value)
            for source in _carried(flow, operand.node):
                if source.value not in seen:
                    seen.add(source.value)
                    stack.append(source)
    return frozenset(found)


def _carried(flow: Dataflow, node: fx.Node) -> Iterator[Operand]:
    """The operands of a backward op whose elements are its result's."""
    name = str(node.target.overloadpacket) if isinstance(node.target, OpOverload) else ""
    operands_ = flow.operands_of.get(node, ()) if is_backward(node) else ()
    if name in _CARRIERS or (name in _PRODUCTS and len(operands_) == 1):
        yield from (o for o in operands_ if o.base_tensor.is_floating_point())


def is_backward(node: fx.Node) -> bool:
    """Whether a node belongs to the backward pass."""
    return node.meta.get("phase") == "backward"


def module_path(node: fx.Node) -> str:
    """Where in the model a node comes from, "" if unknown."""
    path: Any = node.meta.get("module_path", "")
    return path if isinstance(path, str) else ""


def gradients_by_node(trace: Trace) -> dict[fx.Node | None, list[tuple[ParamInfo, Operand]]]:
    """The parameters whose gradient an op makes, with it; under None those whose gradient no op makes."""
    nodes = {n.name: n for n in trace.graph_module.graph.nodes}
    found: dict[fx.Node | None, list[tuple[ParamInfo, Operand]]] = {}
    for param in trace.params:
        if param.fqn in trace.grads:
            operand = resolve(nodes[trace.grads[param.fqn]])
            made_by = operand.node if operand.node.op == "call_function" else None
            found.setdefault(made_by, []).append((param, operand))
    return found


def outputs_by_value(trace: Trace) -> list[tuple[str, Operand, bool]]:
    """(name, operand, whether it must be whole on every rank) per output."""
    nodes = {n.name: n for n in trace.graph_module.graph.nodes}
    outputs = [(name, True) for name in trace.whole_outputs]
    outputs += [(o.node, False) for o in trace.outputs if o.node and (o.node, True) not in outputs]
    outputs += [(name, True) for name in trace.buffer_updates.values()]
    unique = dict(sorted(outputs, key=lambda item: item[1]))  # True wins over False
    return [(name, resolve(nodes[name]), whole) for name, whole in unique.items()]
