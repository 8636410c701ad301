"""Is the loss of a batch a weighted sum of the losses of its micro-batches, and with which weights?

Micro-batching is data parallelism over time: what the rules of ops say of a batch that is cut over ranks is true of one
that is cut into micro-batches, but for this: a micro-batch cannot wait for the others, so no op may exchange anything.
The forward pass is walked with the batch cut into parts, down to the loss. On the way every value is one of

    the same       for all micro-batches: it depends on parameters and on inputs without a batch
    cut            along one dim: each micro-batch makes its part
    weighed        the sum of what the micro-batches make by weights: 1 (a sum), 1/M (a mean over equally many), or
                   n_m/N (a mean over n_m things in micro-batch m and N in all: tokens that are no padding), where n_m
                   depends on inputs alone

What is linear takes weighed values to weighed values. Everything else (statistics of the batch, products of means)
makes the loss of a batch something that no micro-batch knows: an error names the op.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from autopar._torch_compat import OpOverload
from autopar.dataflow import is_backward, is_view_node, module_path, result_metas
from autopar.errors import TraceError
from autopar.placements import PARTIAL, REPLICATE, Placement, shard, shard_dim
from autopar.rules import axis_rules, operands
from autopar.rules.schema import OpCall, op_call
from autopar.tracing.types import Trace

aten = torch.ops.aten
# Ops of which a larger batch takes more of the same.
_REPEATING = (
    "expand", "repeat", "full", "zeros", "ones", "new_zeros", "new_ones", "new_full", "full_like", "zeros_like",
    "ones_like",
)  # fmt: skip
_LOSSES = ("aten.nll_loss_forward", "aten.nll_loss2d_forward")
_MEAN = 1  # as torch numbers reductions
# Lowerings of rules by which a part makes its result alone; of these, such as take sums to sums. Each micro-batch sorts
# its own tokens' rows into groups.
_LINEAR = ("local", "to_groups", "from_groups")
_APART = (*_LINEAR, "mean_partial", "draw")
REMEDY = "use one micro-batch a step (micro_batch = global batch / dp)"


@dataclass(frozen=True)
class Weight:
    """How what the micro-batches make is weighed.

    kind: "sum", "mean" or "counted". counted: the value that counts (a node, and which of its results); of a loss over
        class indices the node of the loss, whose targets are counted.
    """

    kind: str
    counted: str | None = None


SUM, MEAN = Weight("sum"), Weight("mean")
Count = Callable[[Mapping[str, torch.Tensor]], float]  # of the values of a micro-batch, by placeholder


@dataclass(frozen=True)
class Part:
    """What a micro-batch knows of a value: see the head of this file. weight: of weighed values.

    numbers: whether it holds the numbers 0, 1, .. of the samples: a micro-batch counts its own from 0, so they may only
        pick samples.
    """

    placement: Placement
    weight: Weight | None = None
    numbers: bool = False


SAME = Part(REPLICATE)


@dataclass(frozen=True)
class MicroBatchLoss:
    """How the losses of micro-batches make the loss of their batch. trace: of one micro-batch."""

    trace: Trace
    weight: Weight

    @cached_property
    def _count(self) -> Count:
        """What a micro-batch counts."""
        return counter(next(n for n in self.trace.graph_module.graph.nodes if n.name == self.weight.counted))

    @cached_property
    def counts_from(self) -> frozenset[str]:
        """The placeholders that counting takes; what else a batch holds does not matter."""
        if self.weight.counted is None:
            return frozenset()
        node = next(n for n in self.trace.graph_module.graph.nodes if n.name == self.weight.counted)
        return frozenset(n.name for n in _ancestors(node) if n.op == "placeholder")

    def weights(self, batches: Sequence[Mapping[str, torch.Tensor]]) -> list[float]:
        """The weight of each micro-batch's loss.

        batches: whole values of the inputs (and the buffers and constants that counting takes), per micro-batch, by
        placeholder.
        """
        if self.weight.kind == "sum":
            return [1.0] * len(batches)
        if self.weight.kind == "mean":
            return [1 / len(batches)] * len(batches)
        counts = [self._count(values) for values in batches]
        total = sum(counts)
        return [count / total if total else float("nan") for count in counts]  # as one device: nothing over nothing


def micro_batch_loss(larger: Trace, traced: Trace) -> MicroBatchLoss:
    """How micro-batches of the size of `traced` make up larger batches.

    larger: the same model, traced with a batch that is a multiple (two or more) of that of `traced`.
    Raises TraceError naming the first op of which a larger batch is more than its micro-batches.
    """
    if traced.loss is None:
        raise TraceError("a model without a loss cannot run in micro-batches: how its outputs add up is not known")
    walk = _Walk(larger, traced)
    return MicroBatchLoss(traced, walk.loss())


class _Walk:
    """One walk through the forward passes of both traces, node by node."""

    def __init__(self, larger: Trace, traced: Trace) -> None:
        self.larger, self.traced = larger, traced
        pairs = zip(larger.graph_module.graph.nodes, traced.graph_module.graph.nodes, strict=False)
        self.pairs = {a: b for a, b in pairs if a.op != "output"}
        self.times = self._times()
        inputs = {i.node for i in larger.inputs if i.batch_dim == 0}
        self.batched = inputs
        self.parts: dict[fx.Node, tuple[Part | None, ...]] = {}
        self.by_inputs = _by_inputs(larger)

    def _times(self) -> int:
        """How many micro-batches the larger batch has; both traces must be the same but for sizes."""
        sizes = {i.node: i.shape[0] for i in self.traced.inputs if i.batch_dim == 0}
        counts = {i.shape[0] / sizes[i.node] for i in self.larger.inputs if i.node in sizes}
        if len(counts) != 1 or (count := counts.pop()) < 2 or count != int(count):
            raise TraceError("the micro-batches do not divide the batch; give a batch that is a multiple of them")
        if len(self.larger.graph_module.graph.nodes) != len(self.traced.graph_module.graph.nodes):
            raise TraceError(f"the model computes otherwise for another batch size; {REMEDY}")
        for a, b in self.pairs.items():
            if a.target != b.target and a.op != "placeholder":
                raise TraceError(f"the model computes otherwise for another batch size, at {_where(a)}; {REMEDY}")
        return int(count)

    def loss(self) -> Weight:
        """The weight of the loss."""
        nodes = {n.name: n for n in self.larger.graph_module.graph.nodes}
        assert self.larger.loss is not None
        loss = nodes[self.larger.loss]
        self._check_buffers(nodes)
        needed = _ancestors(loss)
        for node in self.larger.graph_module.graph.nodes:
            if node in needed:
                self.parts[node] = self._parts(node)
        part = self.parts[loss][0]
        if part is None or part.weight is None:
            raise TraceError(f"the loss, made at {_where(loss)}, does not depend on the batch; {REMEDY}")
        return part.weight

    def _check_buffers(self, nodes: Mapping[str, fx.Node]) -> None:
        for fqn, node in self.larger.buffer_updates.items():
            raise TraceError(
                f"buffer {fqn} takes statistics of the whole batch (at {_where(nodes[node])}), which no micro-batch "
                f"knows; {REMEDY}"
            )

    def _parts(self, node: fx.Node) -> tuple[Part | None, ...]:
        """What a micro-batch knows of the results of a node."""
        if node.op == "placeholder":
            return (Part(shard(0)) if node.name in self.batched else SAME,)
        if node.target is operator.getitem:
            return (self.parts[node.args[0]][int(node.args[1])],)  # type: ignore[index,arg-type]
        taken = [self.parts[i][0] or SAME for i in operands(node)]
        self._check_numbers(node)
        if all(part == SAME for part in taken):
            return tuple(self._grown(node, index) for index in range(len(result_metas(node))))
        if isinstance(node.target, OpOverload):
            found = self._by_rule(node, taken)
            if found is not None:
                return found
        raise TraceError(
            f"nothing says that the loss of a batch is that of its micro-batches put together: {_where(node)} takes "
            f"all samples at once; {REMEDY}"
        )

    def _check_numbers(self, node: fx.Node) -> None:
        """A number among the arguments may depend on the batch size only as sizes do."""
        mine, theirs = list(_numbers(node)), list(_numbers(self.pairs[node]))
        for a, b in zip(mine, theirs, strict=True):
            if a != b and not (isinstance(a, int) and a == b * self.times and _takes_sizes(node)):
                raise TraceError(f"{_where(node)} computes with the batch size ({a}, {b} in a micro-batch); {REMEDY}")

    def _grown(self, node: fx.Node, index: int) -> Part | None:
        """A result that depends on no batch: the same, or a constant that is repeated for each sample."""
        mine, theirs = result_metas(node)[index], result_metas(self.pairs[node])[index]
        if mine is None or theirs is None or mine.shape == theirs.shape:
            return SAME
        (dim, *others) = [d for d in range(mine.dim()) if mine.shape[d] != theirs.shape[d]]
        name = node.target.overloadpacket.__name__ if isinstance(node.target, OpOverload) else ""
        if name == "arange" and node.args[:-1] in ((), (0,)):
            return Part(shard(0), numbers=True)
        if others or name not in _REPEATING:
            raise TraceError(f"{_where(node)} numbers the samples of a batch; {REMEDY}")
        return Part(shard(dim))

    def _by_rule(self, node: fx.Node, taken: Sequence[Part]) -> tuple[Part | None, ...] | None:
        """By the rules of the op, without those that exchange anything."""
        if any(part.numbers for part in taken):
            return self._picked(node, taken)
        call = op_call(node)
        weights = {part.weight for part in taken if part.weight is not None}
        if len(weights) > 1:
            return self._mean_by_division(call, node, taken)
        if call.name in _LOSSES and not weights:
            return self._counted_loss(call, node, taken)
        if node.target is aten.cat.default and not weights:
            return self._joined(node, taken)
        wanted = tuple(part.placement for part in taken)
        for rule in axis_rules(node, self.times).rules:
            if rule.inputs != wanted or rule.collectives or rule.lowering not in _APART:
                continue
            made = MEAN if rule.lowering == "mean_partial" else SUM
            weight = next(iter(weights), made)
            if weights and rule.lowering not in _LINEAR:
                continue
            return tuple(_made(p, weight) for p in rule.outputs)
        return self._mean_by_division(call, node, taken) if weights else None

    def _picked(self, node: fx.Node, taken: Sequence[Part]) -> tuple[Part | None, ...] | None:
        """A view of the numbers of samples, or what they pick, one row a sample."""
        if is_view_node(node):
            rules = [r for r in axis_rules(node, self.times).rules if r.inputs == (taken[0].placement,)]
            return tuple(Part(p or REPLICATE, numbers=True) for p in rules[0].outputs) if rules else None
        if node.target is not aten.index.Tensor or any(part.numbers for part in (taken[0], *taken[2:])):
            return None
        indices: Any = node.args[1]
        others = any(part != SAME for part in taken[2:])
        if taken[0] != Part(shard(0)) or others or any(i is None for i in indices[: len(taken) - 1]):
            return None
        dims = [i.meta["val"].dim() for i in indices if i is not None]
        dim = shard_dim(taken[1].placement)
        return None if dim is None else (Part(shard(dim + max(dims) - dims[0])),)

    def _joined(self, node: fx.Node, taken: Sequence[Part]) -> tuple[Part | None, ...] | None:
        """Tensors that are cut alike, along another dim than they are joined. Empty ones do not count."""
        parts = {p for p, i in zip(taken, operands(node), strict=True) if i.meta["val"].numel()}
        dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
        joined = shard(dim % node.meta["val"].dim())
        return tuple(parts) if len(parts) == 1 and joined not in {p.placement for p in parts} else None

    def _counted_loss(self, call: OpCall, node: fx.Node, taken: Sequence[Part]) -> tuple[Part | None, ...] | None:
        """A negative log-likelihood over samples; its mean is weighed by how many targets a micro-batch has."""
        scores, targets = taken[0], taken[1]
        dim, target_dim = shard_dim(scores.placement), shard_dim(targets.placement)
        class_dim = 1 if call.inputs[0].dim() > 1 else 0
        if dim is None or dim == class_dim or target_dim != dim - (dim > class_dim):
            return None
        if any(part != SAME for part in taken[2:]):
            return None
        reduction = call.arg("reduction")
        if reduction == 0:
            return (Part(shard(target_dim)), SAME)
        counted = next(i for i in node.all_input_nodes if i is operands(node)[1])
        if reduction == _MEAN and counted not in self.by_inputs:
            return None
        return (
            Part(PARTIAL, Weight("counted", self.pairs[node].name) if reduction == _MEAN else SUM),
            Part(PARTIAL, SUM),
        )

    def _mean_by_division(self, call: OpCall, node: fx.Node, taken: Sequence[Part]) -> tuple[Part | None, ...] | None:
        """sum / count: a mean by what a micro-batch counts, if inputs alone decide that."""
        if call.name != "aten.div" or len(taken) != 2 or call.arg("rounding_mode") is not None:
            return None
        above, below = taken
        divisor = operands(node)[1]
        if above.weight != SUM or below.weight != SUM or divisor not in self.by_inputs or node.meta["val"].dim():
            return None
        return (Part(PARTIAL, Weight("counted", self.pairs[divisor].name)),)


def _made(placement: Placement | None, weight: Weight) -> Part | None:
    if placement is None:
        return None
    return Part(placement, weight if placement == PARTIAL else None)


def counter(node: fx.Node) -> Count:
    """What a node counts in one micro-batch, of its values: its own value, or of a loss over class indices its
    targets."""
    if str(getattr(node.target, "overloadpacket", "")) not in _LOSSES:
        return lambda values: float(_evaluate(node, values))
    ignored = op_call(node).arg("ignore_index")
    nodes = dict(zip(("self", "target", "weight"), node.args, strict=False))
    weight = nodes.get("weight")

    def count(values: Mapping[str, torch.Tensor]) -> float:
        target = _evaluate(nodes["target"], values)
        counted = target != ignored
        if isinstance(weight, fx.Node):
            return float(_evaluate(weight, values)[target[counted]].sum())
        return float(counted.sum())

    return count


def _evaluate(node: Any, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The value of a node of which inputs alone decide: few nodes, every step again."""
    env: dict[fx.Node, Any] = {}
    stack = [node]
    with torch.no_grad():
        while stack:
            at = stack[-1]
            missing = [i for i in at.all_input_nodes if i not in env]
            if missing:
                stack += missing
                continue
            stack.pop()
            if at.op == "placeholder":
                env[at] = values[at.name]
            elif at not in env:
                args, kwargs = fx.node.map_arg((at.args, at.kwargs), env.__getitem__)
                env[at] = at.target(*args, **kwargs)
    found = env[node]
    assert isinstance(found, torch.Tensor)
    return found


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and all that it depends on."""
    found, stack = {node}, [node]
    while stack:
        new = [i for i in stack.pop().all_input_nodes if i not in found]
        found.update(new)
        stack += new
    return found


def _by_inputs(trace: Trace) -> set[fx.Node]:
    """The forward nodes that depend on no parameter."""
    params = {p.node for p in trace.params}
    found: set[fx.Node] = set()
    for node in trace.graph_module.graph.nodes:
        if node.op == "output" or node.name in params or is_backward(node):
            continue
        if all(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _numbers(node: fx.Node) -> Iterator[Any]:
    """The arguments of a node that are no tensors, flat."""
    found: list[Any] = []

    def walk(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for item in value:
                walk(item)
        elif isinstance(value, dict):
            walk(list(value.values()))
        elif not isinstance(value, fx.Node):
            found.append(value)

    walk([node.args, node.kwargs])
    return iter(found)


def _takes_sizes(node: fx.Node) -> bool:
    """Whether the whole numbers among an op's arguments may be sizes."""
    if is_view_node(node):
        return True
    return node.target is aten.arange.default or "SymInt" in str(getattr(node.target, "_schema", ""))


def _where(node: fx.Node) -> str:
    path = module_path(node)
    return f"{node.name} ({node.target})" + (f" in module {path}" if path else "")
