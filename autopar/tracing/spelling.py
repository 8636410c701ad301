"""How forward code spells what attention is made of: operators, methods and functions of torch, in place or not.

Read in Dynamo's graph, whose nodes carry their fake results as `meta["example_value"]`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional

_FUNCTIONS: dict[Any, str] = {
    torch.matmul: "matmul", torch.bmm: "matmul", operator.matmul: "matmul",
    torch.transpose: "transpose", torch.swapaxes: "transpose", torch.swapdims: "transpose", torch.permute: "permute",
    torch.mul: "mul", torch.multiply: "mul", operator.mul: "mul", operator.imul: "mul",
    torch.div: "div", torch.divide: "div", torch.true_divide: "div", operator.truediv: "div", operator.itruediv: "div",
    torch.add: "add", operator.add: "add", operator.iadd: "add",
    torch.masked_fill: "masked_fill", torch.where: "where",
    torch.softmax: "softmax", functional.softmax: "softmax", torch.special.softmax: "softmax",
    functional.dropout: "dropout", torch.dropout: "dropout", torch.clone: "clone",
}  # fmt: skip
_METHODS = {
    "matmul": "matmul", "bmm": "matmul", "transpose": "transpose", "swapaxes": "transpose", "swapdims": "transpose",
    "permute": "permute", "mul": "mul", "mul_": "mul", "div": "div", "div_": "div", "add": "add", "add_": "add",
    "masked_fill": "masked_fill", "masked_fill_": "masked_fill", "where": "where", "softmax": "softmax",
    "to": "cast", "type": "cast", "type_as": "cast", "float": "cast", "double": "cast", "half": "cast",
    "bfloat16": "cast", "contiguous": "clone", "clone": "clone",
}  # fmt: skip
_WRITES = {
    operator.iadd, operator.iand, operator.iconcat, operator.ifloordiv, operator.ilshift, operator.imatmul,
    operator.imod, operator.imul, operator.ior, operator.ipow, operator.irshift, operator.isub, operator.itruediv,
    operator.ixor, operator.setitem, operator.delitem,
}  # fmt: skip
_SWITCHES = "autocast"  # in the name of what turns autocast on and off


def spelled(node: fx.Node) -> str:
    """The name of an op however it is written, "" for those that attention has no part of."""
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target, "")
    return _METHODS.get(str(node.target), "") if node.op == "call_method" else ""


def made(node: Any) -> torch.Tensor | None:
    """The fake tensor that a node makes; None for what is no node, or makes none."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument by its place or its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def product(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The operands of a batched product of matrices, none of which is repeated for the other."""
    if not isinstance(node, fx.Node) or spelled(node) != "matmul" or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    a, b = made(left), made(right)
    if a is None or b is None or a.dim() not in (3, 4) or a.shape[:-2] != b.shape[:-2]:
        return None
    return left, right  # type: ignore[return-value]


def transposed(node: fx.Node) -> fx.Node | None:
    """x, if a node is x with its last two dims exchanged."""
    source, value = node.args[0] if node.args else None, made(node)
    if not isinstance(source, fx.Node) or value is None:
        return None
    dims = list(range(value.dim()))
    swapped = [*dims[:-2], dims[-1], dims[-2]]
    if spelled(node) == "transpose" and len(node.args) == 3:
        first, second = (int(d) % value.dim() for d in node.args[1:])  # type: ignore[arg-type]
        return source if {first, second} == set(dims[-2:]) else None
    if spelled(node) == "permute" and not node.kwargs:
        order: Any = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return source if [int(d) % value.dim() for d in order] == swapped else None
    is_mt = node.target is getattr and node.args[1] in ("mT", "mH") and not value.is_complex()
    return source if is_mt else None


def read_what_is_written(graph: fx.Graph) -> None:
    """Let what reads a tensor after it was changed in place read the result of the change: it is the same tensor."""
    for node in list(graph.nodes):
        source = node.args[0] if node.args and spelled(node) and _writes(node) else None
        if isinstance(source, fx.Node) and source.op != "placeholder" and len(source.users) > 1:
            for user in [user for user in source.users if user > node]:
                user.replace_input_with(source, node)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one, if only one does, and once."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and sum(n is node for n in _read(user)) == 1 else None


def _read(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def can_be_late(nodes: Sequence[fx.Node]) -> bool:
    """Whether what `nodes` compute, in order, may all be computed where the last of them stands: nothing between first
    and last, but they, writes to a tensor or switches autocast."""
    own, node = set(nodes), nodes[0]
    while node is not nodes[-1]:
        if node not in own and (_writes(node) or _SWITCHES in getattr(node.target, "__name__", "")):
            return False
        node = node.next
    return True


def _writes(node: fx.Node) -> bool:
    if node.target in _WRITES or "out" in node.kwargs or node.kwargs.get("inplace") is True:
        return True
    named_so = node.op == "call_method" or getattr(node.target, "__module__", None) != operator.or_.__module__
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return named_so and ((name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__delitem__"))
