"""The numbers of tensors in Dynamo's graph that depend on no input, parameter or buffer: a mask of positions, say."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from autopar.tracing.spelling import made

_MOST_ELEMENTS = 2**25  # of a tensor that is computed here: the mask of a sequence of 5,792 tokens
_FUNCTIONS = {
    torch.arange, torch.full, torch.zeros, torch.ones, torch.tensor, torch.scalar_tensor, torch.full_like,
    torch.zeros_like, torch.ones_like, torch.tril, torch.triu, torch.logical_not, torch.bitwise_not, torch.eq, torch.ne,
    torch.lt, torch.le, torch.gt, torch.ge, torch.logical_and, torch.logical_or, torch.add, torch.sub, torch.mul,
    torch.unsqueeze, torch.where, operator.getitem, operator.eq, operator.ne, operator.lt, operator.le, operator.gt,
    operator.ge, operator.and_, operator.or_, operator.invert, operator.add, operator.sub, operator.mul, operator.neg,
}  # fmt: skip
_METHODS = {
    "tril", "triu", "logical_not", "bitwise_not", "eq", "ne", "lt", "le", "gt", "ge", "bool", "int", "long", "float",
    "unsqueeze", "expand", "view", "reshape", "repeat", "new_ones", "new_zeros", "new_full", "masked_fill", "to",
    "type",
}  # fmt: skip


def known(node: Any) -> torch.Tensor | None:
    """The numbers of a small tensor that depends on no input, on the CPU."""
    value = made(node)
    if value is None or not _is_known(node, set()):
        return None
    values: dict[fx.Node, Any] = {}
    for source in _ancestors(node):
        args, kwargs = fx.node.map_aggregate(
            (source.args, source.kwargs), lambda a: values[a] if isinstance(a, fx.Node) else _at_home(a)
        )
        if source.op == "call_function":
            values[source] = source.target(*args, **kwargs)  # type: ignore[operator]
        else:
            values[source] = getattr(args[0], str(source.target))(*args[1:], **kwargs)
    result: torch.Tensor = values[node]
    return result


def _at_home(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _is_known(node: fx.Node, seen: set[fx.Node]) -> bool:
    if node in seen:
        return True
    seen.add(node)
    value = made(node)
    if value is None or value.numel() > _MOST_ELEMENTS:
        return False
    listed = node.target in (_FUNCTIONS if node.op == "call_function" else _METHODS)
    return listed and node.op.startswith("call_") and all(_is_known(n, seen) for n in node.all_input_nodes)


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """All that a node is computed from and itself, first to last."""
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return [n for n in node.graph.nodes if n in found]
