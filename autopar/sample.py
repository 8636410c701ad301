"""Makes up values for verification: inputs of the right range, weights where the model has none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from autopar.dataflow import result_metas
from autopar.errors import PlanMismatch
from autopar.plans import Plan
from autopar.trace import Trace, input_leaves

aten = torch.ops.aten
Call = tuple[tuple[Any, ...], dict[str, Any]]


def sample_call(plan: Plan) -> Call:
    """A call with meta tensors of the plan's input shapes, for models whose inputs are keyword arguments."""
    kwargs = {}
    for info in plan.inputs:
        if not info.path.isidentifier():
            raise PlanMismatch(f"input {info.path!r} is nested; pass example_inputs=(args, kwargs) to verify")
        kwargs[info.path] = torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
    return (), kwargs


def sample_values(traced: Trace, model: nn.Module, call: Call, seed: int) -> dict[str, torch.Tensor]:
    """A value per placeholder of the trace: the model's and the call's own where they have one, else random."""
    generator = torch.Generator().manual_seed(seed)
    nodes = {n.name: n for n in traced.graph_module.graph.nodes if n.op == "placeholder"}
    leaves = input_leaves(model.forward, *call)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    values: dict[str, torch.Tensor] = {}
    for param in traced.params:
        values[param.node] = _value(tensors.get(param.fqn), nodes[param.node], generator)
    for buffer in traced.buffers:
        values[buffer.node] = _value(tensors.get(buffer.fqn), nodes[buffer.node], generator)
    for constant in traced.constants:
        values[constant.node] = _value(constant.value, nodes[constant.node], generator)
    for info in traced.inputs:
        values[info.node] = _value(leaves[info.path], nodes[info.node], generator)
    for name in traced.tangents:
        tangent = result_metas(nodes[name])[0]
        assert tangent is not None
        ones = traced.loss is not None
        values[name] = torch.ones(tangent.shape, dtype=tangent.dtype) if ones else _value(None, nodes[name], generator)
    return values


def _value(given: torch.Tensor | None, node: fx.Node, generator: torch.Generator) -> torch.Tensor:
    if given is not None and type(given) in (torch.Tensor, nn.Parameter) and not given.is_meta:
        return given.detach().cpu()
    tensor = result_metas(node)[0]
    assert tensor is not None
    if tensor.is_floating_point():
        return (torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.05).to(tensor.dtype)
    high = 2 if tensor.dtype == torch.bool else index_bound(node)
    return torch.randint(0, high, tensor.shape, generator=generator).to(tensor.dtype)


def index_bound(node: fx.Node) -> int:
    """How large an integer input may be: it must index the tables (lookups, classes) it flows into."""
    bounds = [b for user, source in _integer_flow(node) for b in _bound(user, source)]
    return min(bounds, default=2)


def _bound(user: fx.Node, source: fx.Node) -> Iterable[int]:
    if user.target is aten.embedding.default and user.args[1] is source:
        table = result_metas(user.args[0])[0]  # type: ignore[arg-type]
        yield int(table.shape[0]) if table is not None else 2
    if user.target is aten.nll_loss_forward.default and user.args[1] is source:
        scores = result_metas(user.args[0])[0]  # type: ignore[arg-type]
        yield int(scores.shape[-1 if scores.dim() == 1 else 1]) if scores is not None else 2


def _integer_flow(node: fx.Node) -> Iterable[tuple[fx.Node, fx.Node]]:
    """(user, source) pairs reached from `node` through integer tensors."""
    seen, queue = {node}, [node]
    while queue:
        source = queue.pop()
        for user in source.users:
            yield user, source
            result = next(iter(result_metas(user)), None)
            if user not in seen and result is not None and not result.is_floating_point():
                seen.add(user)
                queue.append(user)
