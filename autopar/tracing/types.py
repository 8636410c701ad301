"""Trace and its parts: what is known of a captured model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import OpOverload, pytree
from autopar.grouping import TO_GROUPS
from autopar.placements import Fold


@dataclass(frozen=True)
class ParamInfo:
    """One parameter. `tied`: its other names in the model. `node`: its placeholder."""

    fqn: str
    node: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class BufferInfo:
    """One buffer. `persistent`: whether it is part of the state dict."""

    fqn: str
    node: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    persistent: bool
    tied: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConstantInfo:
    """A tensor that is neither parameter nor buffer nor input.

    Either a plain attribute of a module (`fqn` names it) or a tensor made in the model's
    code, such as `torch.tensor([1.0])` (`fqn` is None). `value` is None where the model
    has none (meta or fake device); a program then reads it from the model by `fqn`.
    """

    node: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: torch.Tensor | None
    fqn: str | None


@dataclass(frozen=True)
class InputInfo:
    """One tensor among the arguments.

    path: "input_ids", "args[0]", "batch.mask": the name in the model's signature, then keys and indices.
    batch_dim: 0 if dim 0 has the size of the global batch (dim 0 of the first tensor input), else None.
    """

    path: str
    node: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_dim: int | None


@dataclass(frozen=True)
class FixedInput:
    """A non-tensor argument, whose value at tracing is part of the graph."""

    path: str
    value: Any


@dataclass(frozen=True)
class OutputInfo:
    """One leaf of what the model returns: the result of `node`, or (`node` is None) the constant `value`.

    tangent: the placeholder of its gradient; None for what is not differentiable.
    """

    path: str
    node: str | None
    value: Any = None
    tangent: str | None = None


@dataclass(frozen=True)
class Trace:
    """A model's joint forward and backward graph on fake tensors.

    graph_module: placeholders first (parameters, buffers, constants, inputs, tangents), then the
        forward nodes, then the backward nodes; the output is one flat tuple, see `results`.
        Each node has meta["val"] (fake tensor), meta["phase"] ("forward" or "backward"),
        meta["module_path"] (such as "model.layers.3.mlp", "" if unknown) and, where known,
        meta["stack_trace"]. A forward node is one that the outputs or buffer updates depend on.
    outputs / out_spec: the leaves of the model's result, and how to rebuild it from them.
    loss: the node of the loss, also among `outputs`, and then the only differentiable one. None for a model that
        returns tensors of which the caller makes a loss: then all that depend on parameters are differentiable.
    grads: parameter name -> node; a parameter without gradient is absent.
    buffer_updates: buffer name -> node of its new value.
    num_forward: how many of the nodes that are neither placeholders nor output are forward.
    twins: for nodes of repeated layers, the node of the same position in one representative layer.
    """

    graph_module: fx.GraphModule
    params: tuple[ParamInfo, ...]
    buffers: tuple[BufferInfo, ...]
    constants: tuple[ConstantInfo, ...]
    inputs: tuple[InputInfo, ...]
    fixed_inputs: tuple[FixedInput, ...]
    outputs: tuple[OutputInfo, ...]
    out_spec: pytree.TreeSpec
    loss: str | None
    grads: dict[str, str]
    buffer_updates: dict[str, str]
    num_forward: int
    twins: dict[str, str] = field(default_factory=dict)

    @property
    def tangents(self) -> tuple[str, ...]:
        """The placeholders of the gradients of the differentiable outputs, in the order of `outputs`."""
        return tuple(o.tangent for o in self.outputs if o.tangent is not None)

    @property
    def whole_outputs(self) -> tuple[str, ...]:
        """The nodes of the outputs that every rank hands out whole: the loss, or all where there is none.

        The caller holds them, and their gradients, while the backward pass runs.
        """
        if self.loss is not None:
            return (self.loss,)
        return tuple(dict.fromkeys(o.node for o in self.outputs if o.node is not None))

    @property
    def fold(self) -> Fold | None:
        """How batch and sequence lie in one dim, if the first batched input has both."""
        first = next((i for i in self.inputs if i.batch_dim == 0 and len(i.shape) > 1), None)
        if first is None or first.shape[1] < 2:
            return None
        length = first.shape[0] * first.shape[1]
        moves = (n for n in self.graph_module.graph.nodes if n.target is TO_GROUPS)
        rows = {int(n.meta["val"].shape[0]) for n in moves}  # of all experts together, alike in all layers
        return Fold(length, first.shape[0], pairs=next((n for n in sorted(rows) if n % length == 0 and n > length), 0))

    @property
    def results(self) -> tuple[str, ...]:
        """The names of the nodes the graph returns, in order: tensor outputs, buffer updates, gradients."""
        leaves = [o.node for o in self.outputs if o.node is not None]
        return (*leaves, *self.buffer_updates.values(), *self.grads.values())

    def rebuild_output(self, tensors: Sequence[Any]) -> Any:
        """What the model returns, from the values of its tensor outputs in the order of `outputs`."""
        values = iter(tensors)
        return pytree.tree_unflatten([o.value if o.node is None else next(values) for o in self.outputs], self.out_spec)

    def code(self) -> str:
        """The graph as Python to read: shapes, dtypes, and the user's source lines as comments."""
        head = [f"# {len(self.params)} parameters, {len(self.buffers)} buffers, {len(self.inputs)} inputs"]
        head += [f"# {p.node}: parameter {p.fqn}{''.join(f' = {t}' for t in p.tied)}" for p in self.params]
        head += [f"# {b.node}: buffer {b.fqn}" for b in self.buffers]
        head += [f"# {i.node}: input {i.path}" for i in self.inputs]
        body = self.graph_module.print_readable(print_output=False)
        return "\n".join([*head, body])


def is_backward(node: fx.Node) -> bool:
    """Whether a node of a Trace belongs to the backward pass."""
    return node.meta["phase"] == "backward"


def graph_hash(trace: Trace) -> str:
    """sha256 (hex) of ops, shapes, dtypes, wiring and the names of parameters, buffers and inputs.

    Not of files, lines, node names or devices: the same model gives the same hash in every run and on every machine.
    """
    index = {node: i for i, node in enumerate(trace.graph_module.graph.nodes)}
    digest = hashlib.sha256()
    for node in trace.graph_module.graph.nodes:
        line = (node.op, _target_text(node), _text((node.args, node.kwargs), index), _shape_text(node.meta.get("val")))
        digest.update(repr(line).encode())
    names = {node.name: i for node, i in index.items()}
    roles: list[tuple[Any, ...]] = [("param", p.fqn, names[p.node], p.requires_grad, p.tied) for p in trace.params]
    roles += [("buffer", b.fqn, names[b.node], b.persistent, b.tied) for b in trace.buffers]
    roles += [("input", i.path, names[i.node]) for i in trace.inputs]
    roles += [("output", o.path, None if o.node is None else names[o.node]) for o in trace.outputs]
    if trace.loss is None:
        roles += [("tangent", o.path, names[o.tangent]) for o in trace.outputs if o.tangent is not None]
    roles += [("grad", fqn, names[node]) for fqn, node in trace.grads.items()]
    roles += [("update", fqn, names[node]) for fqn, node in trace.buffer_updates.items()]
    digest.update(repr(roles).encode())
    return digest.hexdigest()


def _target_text(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return ""
    target: Any = node.target
    return str(target) if isinstance(target, OpOverload) else getattr(target, "__name__", str(target))


def _text(value: Any, index: dict[fx.Node, int]) -> str:
    """A stable text of an argument; devices are left out."""
    if isinstance(value, fx.Node):
        return f"%{index[value]}"
    if isinstance(value, torch.device):
        return "device"
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_text(v, index) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_text(v, index)}" for k, v in sorted(value.items())) + "}"
    return f"{type(value).__name__}:{value!r}"


def _shape_text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)}{value.dtype}"
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_shape_text(v) for v in value) + "]"
    return ""
