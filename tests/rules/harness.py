"""Runs one op whole, and lowered on all ranks of a mesh in lockstep, and compares.

A *case* is a node whose meta["val"] and whose operands' meta["val"] are real tensors, so
that the node is both what rules and lowerings read and the reference to compare with.
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autopar.codegen.lowerings import lower
from autopar.placements import State, in_groups, is_dealt, local_shape, runs_left, shard_dim
from autopar.rules import AxisRule, axis_rules, compatible, operands, results

ALL_REDUCE = "all_reduce"
PERMUTE = "permute"


def case(op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A single-op graph: every tensor is an operand, the op's result is in meta["val"]."""
    graph = fx.Graph()

    def placeholder(tensor: torch.Tensor) -> fx.Node:
        node = graph.placeholder("x")
        node.meta["val"] = tensor
        return node

    lifted = torch.utils._pytree.tree_map_only(torch.Tensor, placeholder, (args, kwargs))
    node = graph.call_function(op, *lifted)
    node.meta["val"] = kernel(op)(*args, **kwargs)
    return node


def kernel(target: Callable[..., Any]) -> Callable[..., Any]:
    """What computes a target here: torch's decomposition of ops that have no CPU kernel, else the target."""
    if target is torch.ops.aten._fused_rms_norm_backward.default:
        return torch._decomp.decomposition_table[target]
    return target


@dataclass
class Context:
    """A LowerContext that writes all_reduce as a marked call, for `run_ranks` to perform."""

    mesh: tuple[int, ...]
    graph: fx.Graph = field(default_factory=fx.Graph)

    def __post_init__(self) -> None:
        self.coords = [self.graph.placeholder(f"coord{axis}") for axis in range(len(self.mesh))]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def coord(self, axis: int) -> fx.Node:
        return self.coords[axis]

    def all_reduce(self, x: fx.Node, axis: int, op: str = "sum") -> fx.Node:
        node = self.graph.call_function(operator.pos, (x,))
        node.meta[ALL_REDUCE] = (axis, op)
        return node

    def permute(self, x: fx.Node, axis: int, destinations: Sequence[int]) -> fx.Node:
        node = self.graph.call_function(operator.pos, (x,))
        node.meta[PERMUTE] = (axis, tuple(destinations))
        return node


def ranks(mesh: Sequence[int]) -> list[tuple[int, ...]]:
    """The coordinates of all ranks, the last axis innermost."""
    return list(itertools.product(*(range(n) for n in mesh)))


def run_ranks(graph: fx.Graph, inputs: Sequence[Sequence[Any]], outputs: Sequence[fx.Node | None], mesh: Sequence[int]):
    """Evaluate the graph on every rank, node by node. inputs: per placeholder, a value per rank."""
    env: dict[fx.Node, list[Any]] = {}
    feed = iter(inputs)
    at = ranks(mesh)
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = list(next(feed))
        elif ALL_REDUCE in node.meta:
            env[node] = _all_reduce(env[node.args[0]], *node.meta[ALL_REDUCE], at)
        elif PERMUTE in node.meta:
            env[node] = _permute(env[node.args[0]], *node.meta[PERMUTE], at)
        else:
            env[node] = []
            for rank in range(len(at)):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n, r=rank: env[n][r])
                env[node].append(kernel(node.target)(*args, **kwargs))
    return [None if out is None else env[out] for out in outputs]


def _all_reduce(values: list[Any], axis: int, op: str, at: list[tuple[int, ...]]) -> list[Any]:
    combine = {"sum": operator.add, "max": torch.maximum}[op]
    made = []
    for coords in at:
        others = coords[:axis] + coords[axis + 1 :]
        group = [v for v, c in zip(values, at, strict=True) if c[:axis] + c[axis + 1 :] == others]
        total = group[0]
        for value in group[1:]:
            total = combine(total, value)
        made.append(total)
    return made


def _permute(values: list[Any], axis: int, destinations: tuple[int, ...], at: list[tuple[int, ...]]) -> list[Any]:
    made: list[Any] = [None] * len(values)
    for value, coords in zip(values, at, strict=True):
        made[at.index((*coords[:axis], destinations[coords[axis]], *coords[axis + 1 :]))] = value
    return made


def cut(tensor: torch.Tensor, state: State, mesh: Sequence[int]) -> list[torch.Tensor]:
    """What each rank holds: shards, copies, or random summands."""
    parts = [tensor]
    for axis, (placement, size) in enumerate(zip(state, mesh, strict=True)):
        dim = shard_dim(placement)
        if dim is not None:
            runs = runs_left(placement, state[:axis], mesh[:axis])
            split = _dealt if is_dealt(placement) else _split
            parts = [chunk for part in parts for chunk in split(part, size, dim, runs)]
        elif placement == "P":
            parts = [summand for part in parts for summand in _summands(part, size)]
        else:
            parts = [part for part in parts for _ in range(size)]
    return parts


def _split(tensor: torch.Tensor, size: int, dim: int, runs: int) -> list[torch.Tensor]:
    """Equal parts of every run of a dim, by rank."""
    if runs == 1:
        return list(tensor.tensor_split(size, dim))
    by_run = [run.tensor_split(size, dim) for run in tensor.chunk(runs, dim)]
    return [torch.cat(part, dim) for part in zip(*by_run, strict=True)]


def _dealt(tensor: torch.Tensor, size: int, dim: int, runs: int) -> list[torch.Tensor]:
    """Of every run of a dim the i-th chunk and the i-th from the end, by rank."""
    by_run = [run.tensor_split(2 * size, dim) for run in tensor.chunk(runs, dim)]
    return [torch.cat([c for run in by_run for c in (run[rank], run[-1 - rank])], dim) for rank in range(size)]


def _gathered(group: Sequence[torch.Tensor], dim: int, runs: int) -> torch.Tensor:
    """The reverse of `_dealt`."""
    size, by_rank = len(group), [part.chunk(2 * runs, dim) for part in group]
    order = [(rank, 0) for rank in range(size)] + [(rank, 1) for rank in reversed(range(size))]
    return torch.cat([by_rank[rank][2 * run + half] for run in range(runs) for rank, half in order], dim)


def _summands(tensor: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Random tensors that add up; what is infinite, or close to it (masks), goes to the first."""
    finite = tensor.abs() < 1e30
    size = torch.where(finite, tensor, torch.zeros_like(tensor)).abs().amax()  # so that rounding stays small
    rest = [torch.where(finite, size * torch.randn_like(tensor), torch.zeros_like(tensor)) for _ in range(parts - 1)]
    return [tensor - sum(rest), *rest]


def glue(parts: Sequence[torch.Tensor], state: State, mesh: Sequence[int], tolerance: float) -> torch.Tensor:
    """The whole tensor from what the ranks hold; copies must agree."""
    parts = list(parts)
    for axis, (placement, size) in reversed(list(enumerate(zip(state, mesh, strict=True)))):
        groups = [parts[i : i + size] for i in range(0, len(parts), size)]
        dim = shard_dim(placement)
        if dim is not None:
            runs = runs_left(placement, state[:axis], mesh[:axis])
            if is_dealt(placement):
                parts = [_gathered(group, dim, runs) for group in groups]
                continue
            parts = [torch.cat([p.chunk(runs, dim)[i] for i in range(runs) for p in group], dim) for group in groups]
        elif placement == "P":
            parts = [torch.stack(group).sum(0) for group in groups]
        else:
            for group in groups:
                for other in group[1:]:
                    assert_same(other, group[0], tolerance, "ranks that should hold the same differ")
            parts = [group[0] for group in groups]
    return parts[0]


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, message: str) -> None:
    """Equal shape and dtype, and numbers to `tolerance` of the largest one (integers and booleans exactly)."""
    assert actual.shape == expected.shape, f"{message}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{message}: {actual.dtype} is not {expected.dtype}"
    if not expected.dtype.is_floating_point:
        assert torch.equal(actual, expected), message
        return
    finite = expected[torch.isfinite(expected)]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    assert torch.allclose(actual, expected, rtol=0, atol=tolerance * scale, equal_nan=True), (
        f"{message}: off by {float((actual - expected).abs().nan_to_num().max()):.3g}"
    )


_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _tolerance(tensors: Sequence[torch.Tensor | None]) -> float:
    return max((_TOLERANCE[t.dtype] for t in tensors if t is not None and t.is_floating_point()), default=1e-10)


def check(node: fx.Node, rules: tuple[AxisRule, ...], mesh: tuple[int, ...]) -> None:
    """Assert that `rules` (one per axis) lower `node` to something that equals the whole op."""
    ctx = Context(mesh)
    sources = operands(node)
    local = [ctx.graph.placeholder("x") for _ in sources]
    inputs: list[list[Any]] = [[c[axis] for c in ranks(mesh)] for axis in range(len(mesh))]
    for slot, source in enumerate(sources):
        inputs.append(cut(source.meta["val"], tuple(r.inputs[slot] for r in rules), mesh))
        local[slot].meta["val"] = inputs[-1][0]
    made = lower(ctx, node, rules, local)
    values = run_ranks(ctx.graph, inputs, made, mesh)
    expected = results(node)
    tolerance = _tolerance([*(source.meta["val"] for source in sources), *expected])
    assert len(values) == len(expected)
    for index, (value, whole) in enumerate(zip(values, expected, strict=True)):
        if whole is None:
            assert value is None
            continue
        state = tuple(r.outputs[index] for r in rules)
        message = f"{node.target} result {index} on {mesh} with {' and '.join(map(str, rules))}"
        for part in value:
            assert tuple(part.shape) == local_shape(whole.shape, state, mesh), message
        if "empty" in str(node.target):
            continue  # of no particular value
        assert_same(glue(value, state, mesh, tolerance), whole, tolerance, message)


def by_groups(rule: AxisRule) -> bool:
    """Whether a rule cuts rows by what they are, which takes several ops (`tests/parity/test_expert_parallel.py`)."""
    return any(p is not None and in_groups(p) for p in (*rule.inputs, *rule.outputs))


def rule_pairs(node: fx.Node, mesh: tuple[int, int]) -> Iterator[tuple[AxisRule, AxisRule]]:
    """All pairs of rules that can be lowered together on a 2-axis mesh and divide."""
    tensors = [*(n.meta["val"] for n in operands(node)), *results(node)]
    for pair in itertools.product(*([r for r in axis_rules(node, n).rules if not by_groups(r)] for n in mesh)):
        columns = list(zip(*((*r.inputs, *r.outputs) for r in pair), strict=True))
        fits = all(
            t is None or local_shape(t.shape, state, mesh) is not None
            for t, state in zip(tensors, columns, strict=True)
        )
        if fits and compatible(pair, mesh):
            yield pair


def sampled(items: Sequence[Any], count: int, seed: int = 0) -> list[Any]:
    """At most `count` of the items, the same ones every time."""
    return list(items) if len(items) <= count else random.Random(seed).sample(list(items), count)


class Recorder(fx.Interpreter):
    """Runs a graph and keeps one case per distinct (op, operand shapes, strides and dtypes, other arguments)."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.cases: dict[Any, fx.Node] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.OpOverload):
            key = torch.utils._pytree.tree_map_only(
                torch.Tensor, lambda t: (tuple(t.shape), t.stride(), t.dtype), (args, kwargs)
            )
            name = f"{target}{key}"
            if name not in self.cases:
                self.cases[name] = case(target, *args, **kwargs)
        return super().call_function(target, args, kwargs)
