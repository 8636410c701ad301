"""Reading an op of a joint graph: its tensors, its arguments by name, what its schema says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import OpOverload
from autopar.placements import REPLICATE, Placement, shard, shard_dim
from autopar.rules.types import AxisRule

Tensor = torch.Tensor

# Views by schema whose result depends on the strides of the operand, or is not an alias on every rank.
_NOT_VIEWS = frozenset({"aten::as_strided", "aten::to", "aten::contiguous"})
# Marked random because of a dropout probability among their arguments.
_DROPOUT_ARGUMENTS = ("dropout_p", "p", "train")


def bind(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """The arguments of an ATen node that are given, (name, value) in schema order."""
    assert isinstance(node.target, OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            yield argument.name, node.args[position]
        elif argument.name in node.kwargs:
            yield argument.name, node.kwargs[argument.name]


def _is_tensor_node(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """All tensor operands of a node in schema order, lists flattened, repeats kept."""
    if isinstance(node.target, OpOverload):
        values: Any = [value for _, value in bind(node)]
    else:
        values = (node.args, node.kwargs)
    found: list[fx.Node] = []
    fx.node.map_arg(values, lambda n: found.append(n) if _is_tensor_node(n) else None)
    return tuple(found)


def results(node: fx.Node) -> tuple[Tensor | None, ...]:
    """The fake tensors a node makes, one per result; None for results that are no tensors."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, (tuple, list)):
        return tuple(v if isinstance(v, Tensor) else None for v in value)
    return ()


@cache
def is_view(op: OpOverload) -> bool:
    """Whether the op only looks at its first operand in another way (schema alias, or _unsafe_view)."""
    schema = op._schema
    if schema.name == "aten::_unsafe_view":
        return True
    if schema.name in _NOT_VIEWS or not schema.arguments or schema.is_mutable:
        return False
    alias = schema.arguments[0].alias_info
    return alias is not None and not alias.is_write


@dataclass(frozen=True)
class OpCall:
    """One op with its arguments on fake tensors.

    args, kwargs: as in the graph. inputs: `operands(node)` as tensors; outputs: `results(node)`.
    """

    op: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Any] = field(repr=False)
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor | None, ...]

    @cached_property
    def name(self) -> str:
        """The op without its overload, as in "aten.add"."""
        return str(self.op.overloadpacket)

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name; the schema's default, then `default`, where it is not given."""
        if name in self.named:
            return self.named[name]
        for argument in self.op._schema.arguments:
            if argument.name == name and argument.has_default_value():
                return argument.default_value
        return default

    def tensor(self, name: str) -> Tensor | None:
        """A tensor argument by name, None if it is absent or no tensor."""
        value = self.arg(name)
        return value if isinstance(value, Tensor) else None

    @cached_property
    def slots(self) -> dict[str, tuple[int, ...]]:
        """Per argument name, the positions of its tensors in `inputs`."""
        found: dict[str, tuple[int, ...]] = {}
        at = 0
        for name, value in self.named.items():
            values = value if isinstance(value, (list, tuple)) else (value,)
            count = sum(isinstance(v, Tensor) for v in values)
            found[name] = tuple(range(at, at + count))
            at += count
        return found

    @property
    def out(self) -> Tensor:
        """The first result, which must exist."""
        first = self.outputs[0]
        assert first is not None
        return first

    def rule(
        self,
        taken: dict[str, Placement | None],
        made: Placement | tuple[Placement, ...],
        lowering: str = "local",
        **extra: Any,
    ) -> AxisRule:
        """A rule from placements by argument name; whatever is not named (or None) is replicated.

        `made`: one placement for all results, or one per result.
        """
        inputs = [REPLICATE] * len(self.inputs)
        for name, placement in taken.items():
            for slot in self.slots.get(name, ()):
                inputs[slot] = placement or REPLICATE
        per_result = made if isinstance(made, tuple) else (made,) * len(self.outputs)
        outputs = tuple(p if t is not None else None for p, t in zip(per_result, self.outputs, strict=True))
        return AxisRule(tuple(inputs), outputs, lowering, **extra)


def op_call(node: fx.Node) -> OpCall:
    """The call of an ATen node. Values of non-tensor nodes (sizes) are taken from their metadata."""
    assert isinstance(node.target, OpOverload)

    def value(n: fx.Node) -> Any:
        return n.meta["val"]

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    named = {name: fx.node.map_arg(v, value) for name, v in bind(node)}
    inputs = tuple(n.meta["val"] for n in operands(node))
    return OpCall(node.target, tuple(args), dict(kwargs), named, inputs, results(node))


def may_be_random(op: OpOverload) -> bool:
    """Whether some calls of the op draw random numbers."""
    return torch.Tag.nondeterministic_seeded in op.tags


def is_random(call: OpCall) -> bool:
    """Whether the op draws random numbers. Ops with a dropout probability do not where it is zero."""
    if not may_be_random(call.op):
        return False
    switches = [call.arg(a) for a in _DROPOUT_ARGUMENTS if any(x.name == a for x in call.op._schema.arguments)]
    if "scaled_dot_product" in call.name or call.name == "aten.native_dropout":
        return all(s is None or bool(s) for s in switches)
    return True


def normalized(dim: int, rank: int) -> int:
    """A dim counted from the front. 0-d tensors have one dim, 0, as in ATen."""
    return dim % max(rank, 1)


def aligned(placement: Placement, tensor: Tensor, like: Tensor) -> Placement:
    """The placement of a broadcast operand where `like` (the result) is cut: the same dim, or "R" where it has none."""
    dim = shard_dim(placement)
    if dim is None:
        return placement
    own = dim - (like.dim() - tensor.dim())
    return shard(own) if own >= 0 and tensor.shape[own] == like.shape[dim] else REPLICATE
