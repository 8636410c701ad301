"""What goes into a backward pass, where its gradients come from, and where they go."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autopar._torch_compat import local_detached
from autopar.trace import Trace


def gradient_sources(trace: Trace) -> dict[str, frozenset[str]]:
    """Per gradient (parameter name), the tangents it depends on."""
    reached: dict[str, frozenset[str]] = {}
    tangents = frozenset(trace.tangents)
    for node in trace.graph_module.graph.nodes:
        own = tangents & {node.name}
        reached[node.name] = own.union(*(reached[source.name] for source in node.all_input_nodes))
    return {fqn: reached[node] for fqn, node in trace.grads.items()}


def tangent(given: torch.Tensor | None, traced: torch.Tensor) -> torch.Tensor:
    """The gradient of an output, laid out as it was when traced; zeros for an output that no loss was made of."""
    shape, stride = tuple(map(int, traced.shape)), tuple(map(int, traced.stride()))
    if given is not None and given.stride() == stride:
        return given
    device = traced.device if given is None else given.device
    made = torch.empty_strided(shape, stride, dtype=traced.dtype, device=device)
    return made.zero_() if given is None else made.copy_(given)


def is_watched(param: torch.Tensor) -> bool:
    """Whether somebody has to be told of its gradient by autograd."""
    return bool(param._backward_hooks) or bool(getattr(param, "_post_accumulate_grad_hooks", None))


def accumulate(params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]) -> None:
    """As autograd does it: a first gradient is taken as it is, if nobody else holds it and it lies as its parameter."""
    taken: set[int] = set()
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            if grad is None or not param.requires_grad:
                continue
            if param.grad is not None:
                param.grad.add_(grad)
                continue
            local = local_detached(grad)
            if local.data_ptr() in taken or local.stride() != local_detached(param).stride():
                grad = torch.empty_like(param).copy_(grad)
            taken.add(local.data_ptr())
            param.grad = grad
