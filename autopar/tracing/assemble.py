"""From AOTAutograd's joint graph with descriptors to a Trace."""

from __future__ import annotations

import itertools
import operator
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from autopar import _torch_compat as compat
from autopar.errors import TraceError
from autopar.tracing.capture import RawJoint
from autopar.tracing.clean import clean
from autopar.tracing.diagnose import at, source_of
from autopar.tracing.dropout import split_dropout
from autopar.tracing.shadow import Shadow
from autopar.tracing.types import BufferInfo, ConstantInfo, FixedInput, InputInfo, OutputInfo, ParamInfo, Trace

_PREFIX = re.compile(r"^captured\.model\.")
KEPT_META = ("val", "phase", "module_path", "stack_trace", "seq_nr", "custom")
_MODULE = re.compile(r"\['([^']+)'\]|\[(\d+)\]")


@dataclass
class _Raw:
    """The nodes of AOTAutograd's graph by what they are."""

    params: dict[str, fx.Node]
    buffers: dict[str, fx.Node]
    inputs: dict[int, fx.Node]
    tangents: dict[int, fx.Node]  # by the plain output they belong to
    outputs: dict[int, fx.Node]
    grads: dict[str, fx.Node]
    updates: dict[str, fx.Node]

    def use_first_names(self, model: nn.Module) -> None:
        """Call each tied tensor by the first of its names in the model, and keep one placeholder for it.

        AOTAutograd makes a placeholder for each name, but Dynamo's graph reads the tensor under one name only.
        """
        first: dict[str, str] = {}
        for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
            for names in _names_by_tensor(named).values():
                first.update(dict.fromkeys(names, names[0]))
        for placeholders in (self.params, self.buffers):
            for fqn in [name for name in placeholders if first.get(name, name) != name]:
                node = placeholders.pop(fqn)
                node.replace_all_uses_with(placeholders.setdefault(first[fqn], node))
        for results in (self.grads, self.updates):
            renamed = {first.get(fqn, fqn): node for fqn, node in results.items()}
            assert len(renamed) == len(results), "a tied tensor is used under one name"
            results.clear()
            results.update(renamed)


def assemble(raw: RawJoint, model: nn.Module, shadow: Shadow, leaves: dict[str, Any]) -> Trace:
    """The Trace of `model` from its raw joint graph. `leaves`: its example arguments by path."""
    roles = _roles(raw.graph_module, [path for path, leaf in leaves.items() if isinstance(leaf, torch.Tensor)])
    roles.use_first_names(model)
    _mark_phases(raw.graph_module.graph, roles)
    _mark_module_paths(raw.graph_module.graph)
    return _Assembler(raw, roles, model, shadow, leaves).trace()


def _fqn(target: str) -> str:
    return _PREFIX.sub("", target)


def _roles(graph_module: fx.GraphModule, input_paths: list[str]) -> _Raw:
    """Sort placeholders and outputs by their descriptors; raises TraceError for what has no place in a Trace."""
    raw = _Raw({}, {}, {}, {}, {}, {}, {})
    attached: list[Any] = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        desc = node.meta["desc"]
        if isinstance(desc, compat.ParamAOTInput):
            raw.params[_fqn(desc.target)] = node
        elif isinstance(desc, compat.BufferAOTInput):
            raw.buffers[_fqn(desc.target)] = node
        elif isinstance(desc, compat.PlainAOTInput):
            raw.inputs[desc.idx] = node
        elif isinstance(desc, compat.TangentAOTInput) and isinstance(desc.output, compat.PlainAOTOutput):
            raw.tangents[desc.output.idx] = node
        elif isinstance(desc, compat.TangentAOTInput) and isinstance(desc.output, compat.InputMutationAOTOutput):
            attached.append(desc.output.mutated_input)
        else:
            raise TraceError(f"the captured graph has an input of an unknown kind ({desc}); please report this model")
    output = graph_module.graph.output_node()
    for node, desc in zip(output.args[0], output.meta["desc"], strict=True):  # type: ignore[arg-type]
        if isinstance(desc, compat.PlainAOTOutput):
            raw.outputs[desc.idx] = node
        elif isinstance(desc, compat.GradAOTOutput):
            if isinstance(node, fx.Node) and isinstance(desc.grad_of, compat.ParamAOTInput):
                raw.grads[_fqn(desc.grad_of.target)] = node
        elif isinstance(desc, compat.InputMutationAOTOutput):
            raw.updates[_updated_buffer(desc.mutated_input, node, input_paths)] = node
        elif node is not None:
            raise TraceError(f"the captured graph has an output of an unknown kind ({desc}); please report this model")
    if attached:  # the graph of one step would reach into the next one
        fqn = _fqn(attached[0].target)
        source = source_of(raw.updates[fqn])
        what = f"buffer {fqn!r} gets a value that requires grad{at(source)}"
        raise TraceError(f"{what}; write .detach() behind the new value", source)
    return raw


def _updated_buffer(mutated: Any, node: Any, input_paths: list[str]) -> str:
    if isinstance(mutated, compat.BufferAOTInput):
        return _fqn(mutated.target)
    source = source_of(node) if isinstance(node, fx.Node) else None
    if isinstance(mutated, compat.PlainAOTInput):
        what, remedy = f"input {input_paths[mutated.idx]!r}", "clone it first"
    else:
        what = f"parameter {_fqn(getattr(mutated, 'target', str(mutated)))!r}"
        remedy = "make it a buffer, or compute a new tensor"
    raise TraceError(f"the model changes its {what} in place{at(source)}; {remedy}", source)


def _mark_phases(graph: fx.Graph, roles: _Raw) -> None:
    """Forward: what the outputs and buffer updates depend on. Backward: the rest, and the tangents."""
    forward: set[fx.Node] = set()
    stack = [n for n in (*roles.outputs.values(), *roles.updates.values()) if isinstance(n, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in forward:
            forward.add(node)
            stack.extend(node.all_input_nodes)
    tangents = set(roles.tangents.values())
    for node in graph.nodes:
        is_input = node.op in ("placeholder", "get_attr") and node not in tangents
        of_forward = node.target is operator.getitem and node.args[0] in forward  # stays with its op
        node.meta["phase"] = "forward" if node in forward or is_input or of_forward else "backward"


def _mark_module_paths(graph: fx.Graph) -> None:
    """meta["module_path"]: from the module stack; a backward node has its forward node's (torch copies it by
    sequence number), and a sum of gradients the common part of its operands' paths."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
        if stack:
            node.meta["module_path"] = _module_path(list(stack.values())[-1][0])
            continue
        paths = [n.meta["module_path"] for n in node.all_input_nodes if n.op == "call_function"]
        is_backward = node.meta["phase"] == "backward"
        node.meta["module_path"] = _common(paths) if is_backward and node.op == "call_function" else ""


def _module_path(text: str) -> str:
    """ "L['self'].model.layers.slice(...)[3].mlp" as "layers.3.mlp"; indices and `_modules[...]` become names."""
    text = text.removeprefix("L['self']").replace("._modules", "")
    text = _MODULE.sub(lambda m: "." + (m.group(1) or m.group(2)), text)
    return ".".join([part for part in text.split(".") if part][1:])


def _common(paths: list[str]) -> str:
    common: list[str] = []
    for level in zip(*(p.split(".") for p in paths), strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


class _Assembler:
    """Writes the clean graph: named placeholders, forward nodes, backward nodes, one flat output."""

    def __init__(self, raw: RawJoint, roles: _Raw, model: nn.Module, shadow: Shadow, leaves: dict[str, Any]) -> None:
        self.raw, self.roles, self.model, self.shadow, self.leaves = raw, roles, model, shadow, leaves
        self.old = raw.graph_module
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}

    def trace(self) -> Trace:
        params, buffers = self._params(), self._buffers()
        constants = [*self._attributes(), *self._made_constants()]
        inputs = self._inputs()
        tangents = {i: self._placeholder(old, "tangent").name for i, old in self.roles.tangents.items()}
        self._copy_ops()
        values = [*self.roles.outputs.values(), *self.roles.updates.values(), *self.roles.grads.values()]
        output = self.graph.output(tuple(self.new[v] for v in values))
        output.meta["phase"] = "backward"
        output.meta["val"] = tuple(self.new[v].meta["val"] for v in values)
        output.meta["module_path"] = ""
        split_dropout(self.graph)
        clean(self.graph)
        names = iter(n.name for n in output.args[0])
        outputs = dict(zip(self.roles.outputs, names, strict=False))
        updates = dict(zip(self.roles.updates, names, strict=False))
        grads = dict(zip(self.roles.grads, names, strict=False))
        self.graph.lint()
        ops = [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]
        return Trace(
            graph_module=compat.graph_module(nn.Module(), self.graph, "JointGraph"),
            params=params,
            buffers=buffers,
            constants=tuple(constants),
            inputs=inputs,
            fixed_inputs=tuple(FixedInput(p, v) for p, v in self.leaves.items() if not isinstance(v, torch.Tensor)),
            outputs=tuple(
                OutputInfo(path, None, value) if i is None else OutputInfo(path, outputs[i], None, tangents.get(i))
                for path, i, value in self.raw.leaves
            ),
            out_spec=self.raw.out_spec,
            loss=None if self.raw.loss_index is None else outputs[self.raw.loss_index],
            grads=grads,
            buffer_updates=updates,
            num_forward=sum(n.meta["phase"] == "forward" for n in ops),
        )

    def _placeholder(self, old: fx.Node, name: str) -> fx.Node:
        node = self.graph.placeholder(re.sub(r"\W+", "_", name).strip("_"))
        node.target = node.name  # the name of the function's argument: as unique as the node's
        node.meta = {k: v for k, v in old.meta.items() if k in KEPT_META}
        self.new[old] = node
        return node

    def _copy_ops(self) -> None:
        old_nodes = [n for n in self.old.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        forward = [n for n in old_nodes if n.meta["phase"] == "forward"]
        backward = [n for n in old_nodes if n.meta["phase"] == "backward"]
        for old in itertools.chain(forward, backward):
            node = self.graph.node_copy(old, self.new.__getitem__)
            node.meta = {k: v for k, v in old.meta.items() if k in KEPT_META}
            self.new[old] = node

    def _params(self) -> tuple[ParamInfo, ...]:
        others = _names_by_tensor(self.model.named_parameters(remove_duplicate=False))
        originals = dict(self.model.named_parameters(remove_duplicate=False))
        found = []
        for fqn, old in self.roles.params.items():
            node = self._placeholder(old, f"p_{fqn}")
            original = originals[fqn]
            tied = others[id(original)]
            found.append(
                ParamInfo(fqn, node.name, tuple(original.shape), original.dtype, original.requires_grad,
                          tuple(n for n in tied if n != fqn))
            )  # fmt: skip
        return tuple(found)

    def _buffers(self) -> tuple[BufferInfo, ...]:
        others = _names_by_tensor(self.model.named_buffers(remove_duplicate=False))
        originals = dict(self.model.named_buffers(remove_duplicate=False))
        found = []
        for fqn, old in self.roles.buffers.items():
            if fqn not in originals:
                continue  # a tensor attribute, see _attributes
            node = self._placeholder(old, f"b_{fqn}")
            original = originals[fqn]
            owner, _, name = fqn.rpartition(".")
            persistent = name not in self.model.get_submodule(owner)._non_persistent_buffers_set
            tied = tuple(n for n in others[id(original)] if n != fqn)
            found.append(BufferInfo(fqn, node.name, tuple(original.shape), original.dtype, persistent, tied))
        return tuple(found)

    def _attributes(self) -> list[ConstantInfo]:
        found = []
        for fqn, original in self.shadow.attributes.items():
            old = self.roles.buffers.get(fqn)
            if old is None or old in self.new:
                continue
            if fqn in self.roles.updates:
                source = source_of(self.roles.updates[fqn])
                raise TraceError(f"the model changes {fqn} in place{at(source)}; register it as a buffer", source)
            node = self._placeholder(old, f"c_{fqn}")
            known = original.device.type != "meta" and not compat.is_fake_tensor(original)
            value = original.detach() if known else None
            found.append(ConstantInfo(node.name, tuple(original.shape), original.dtype, value, fqn))
        return found

    def _made_constants(self) -> list[ConstantInfo]:
        found: list[ConstantInfo] = []
        nodes: dict[int, fx.Node] = {}
        mode = next(iter(self.roles.params.values())).meta["val"].fake_mode
        for old in self.old.graph.find_nodes(op="get_attr"):
            value = getattr(self.old, str(old.target))
            if not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter) or compat.is_fake_tensor(value):
                raise _unreachable(old, value)
            if not old.users:
                continue
            if id(value) not in nodes:
                old.meta.setdefault("val", mode.from_tensor(value))
                nodes[id(value)] = self._placeholder(old, f"c_{len(found)}")
                constant = ConstantInfo(nodes[id(value)].name, tuple(value.shape), value.dtype, value.detach(), None)
                found.append(constant)
            self.new[old] = nodes[id(value)]
        return found

    def _inputs(self) -> tuple[InputInfo, ...]:
        tensors = [(path, leaf) for path, leaf in self.leaves.items() if isinstance(leaf, torch.Tensor)]
        batch = tensors[0][1].shape[0] if tensors and tensors[0][1].ndim else None
        found = []
        for index, (path, leaf) in enumerate(tensors):
            node = self._placeholder(self.roles.inputs[index], path)
            batch_dim = 0 if batch is not None and leaf.ndim and leaf.shape[0] == batch else None
            found.append(InputInfo(path, node.name, tuple(leaf.shape), leaf.dtype, batch_dim))
        return tuple(found)


def _unreachable(node: fx.Node, value: Any) -> TraceError:
    source = source_of(next(iter(node.users)))
    if isinstance(value, fx.GraphModule):
        what, remedy = "uses a control-flow operator of torch (cond, while_loop, scan)", "write it without"
    else:
        what = "reaches a parameter through a closure, a global or an object that is no module"
        remedy = "register it on the module that uses it"
    return TraceError(f"the model {what}{at(source)}; {remedy}", source)


def _names_by_tensor(named: Any) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    return names
