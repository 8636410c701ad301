"""Cleaning a joint graph: what goes, what stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.trace import trace
from autopar.tracing.clean import clean
from autopar.tracing.rewrites import holds
from tests.models import ModelAndInputs, tiny_bert, tiny_llama

aten = torch.ops.aten


def cleaned(function: Callable[..., Any], *args: torch.Tensor, backward: str | None = None) -> fx.GraphModule:
    """The cleaned graph of `function`; nodes whose name starts with `backward` are put in the backward phase."""
    module = make_fx(function, tracing_mode="fake")(*args)
    for node in module.graph.nodes:
        is_backward = backward is not None and node.name.startswith(backward)
        node.meta["phase"] = "backward" if is_backward else "forward"
    clean(module.graph)
    module.recompile()
    return module


def ops(module: fx.GraphModule) -> list[str]:
    return [n.target.__name__ for n in module.graph.nodes if n.op == "call_function"]


x = torch.arange(12.0).reshape(3, 4) - 5
NOOPS: list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = [
    (lambda a: aten.detach(a), x),
    (lambda a: aten.alias(a), x),
    (lambda a: aten.clone(a), x),
    (lambda a: aten.clone(a, memory_format=torch.contiguous_format), x),
    (lambda a: aten._to_copy(a, dtype=torch.float32), x),
    (lambda a: aten.view(a, [3, 4]), x),
    (lambda a: aten.expand(a, [3, 4]), x),
    (lambda a: aten.slice(a, 0, 0, 9), x),
    (lambda a: aten.permute(a, [0, 1]), x),
    (lambda a: aten.pow(a, 1.0), x),
    (lambda a: aten.mul(a, 1), x),
    (lambda a: aten.div(a, 1), x),
    (lambda a: aten.add(a, 0), x.long()),
    (lambda a: aten.t(aten.t(a)), x),
    (lambda a: aten.transpose(aten.transpose(a, 0, 1), 1, -2), x),
]


@pytest.mark.parametrize(("noop", "argument"), NOOPS)
def test_noops_go(noop: Callable[[torch.Tensor], torch.Tensor], argument: torch.Tensor) -> None:
    module = cleaned(lambda a: aten.neg(noop(aten.abs(a))), argument)
    assert ops(module) == ["abs.default", "neg.default"]
    assert torch.equal(module(argument), aten.neg(noop(aten.abs(argument))))


STAY: list[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = [
    (lambda a: aten.clone(a, memory_format=torch.contiguous_format), x.t()),
    (lambda a: aten._to_copy(a, dtype=torch.float64), x),
    (lambda a: aten.view(a, [4, 3]), x),
    (lambda a: aten.slice(a, 0, 1, 9), x),
    (lambda a: aten.permute(a, [1, 0]), torch.ones(3, 3)),
    (lambda a: aten.pow(a, 2), x),
    (lambda a: aten.add(a, 0), x),  # -0.0 + 0 is 0.0
    (lambda a: aten.mul(a, 1.0), x.long()),  # becomes a float
    (lambda a: aten.div(a, 1), x.long()),
    (lambda a: aten.transpose(aten.transpose(a, 0, 1), 1, 2), torch.ones(2, 2, 2)),
]


@pytest.mark.parametrize(("op", "argument"), STAY)
def test_what_changes_something_stays(op: Callable[[torch.Tensor], torch.Tensor], argument: torch.Tensor) -> None:
    module = cleaned(lambda a: aten.neg(op(aten.detach(a))), argument)
    expected = make_fx(lambda a: aten.neg(op(a)))(argument)
    assert ops(module) == ops(expected)


def test_a_copy_of_an_argument_that_is_returned_stays() -> None:
    module = cleaned(lambda a: (aten.clone(a), aten.neg(aten.clone(a))), x)
    assert sorted(ops(module)) == ["clone.default", "neg.default"]
    assert module(x)[0] is not x


def test_equal_expressions_are_shared_also_between_the_passes() -> None:
    def twice(a: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return aten.sin(a), aten.sin(a), aten.mul(a, 2), aten.mul(a, 2.0), aten.cos(a), aten.cos(a)

    assert ops(cleaned(twice, x)) == ["sin.default", "mul.Tensor", "mul.Tensor", "cos.default"]
    across = cleaned(twice, x, backward="cos_1")  # kept or run again: the planner decides
    assert ops(across).count("cos.default") == 1
    assert next(n for n in across.graph.nodes if n.name == "cos").meta["phase"] == "forward"


wide, mask = torch.ones(3, 4, dtype=torch.float64), x > 0


def pad(a: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return aten.slice_backward(a, [3, 4], 1, start, end, 1)


REWRITES: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], list[str]]] = [
    ("views in a row", lambda a: aten.view(aten.view(a, [2, 6]), [12]).abs(), ["view.default", "abs.default"]),
    ("there and back", lambda a: aten.view(aten.view(aten.abs(a), [12]), [3, 4]).neg(), ["abs.default", "neg.default"]),
    ("a cast and back", lambda a: aten._to_copy(aten._to_copy(a.abs(), dtype=wide.dtype), dtype=x.dtype).neg(),
     ["abs.default", "neg.default"]),
    ("a cast on the way", lambda a: aten._to_copy(aten._to_copy(a, dtype=x.dtype), dtype=wide.dtype),
     ["_to_copy.default"]),
    ("and true", lambda a: aten.bitwise_and(aten.new_ones(a, [], dtype=torch.bool), aten.gt(a, 0)), ["gt.Scalar"]),
    ("padded slices", lambda a: pad(a[:, 2:], 2, 9) + (pad(a[:, :1], 0, 1) + pad(a[:, 1:2].neg(), 1, 2)),
     ["slice.Tensor", "slice.Tensor", "slice.Tensor", "neg.default", "cat.default"]),
    ("a number on copies", lambda a: a * (aten.expand(aten.slice(a, 1, 0, 1), [3, 4]) / 7),
     ["slice.Tensor", "div.Tensor", "mul.Tensor"]),
    ("copies for nothing", lambda a: a - aten.expand(aten.slice(a, 1, 0, 1), [3, 4]), ["slice.Tensor", "sub.Tensor"]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "left"), [r[1:] for r in REWRITES], ids=[r[0] for r in REWRITES])
def test_patterns_are_rewritten(function: Callable[[torch.Tensor], torch.Tensor], left: list[str]) -> None:
    argument = torch.randn(3, 4, dtype=torch.bfloat16 if left == ["_to_copy.default"] else torch.float32)
    module = cleaned(function, argument)
    assert ops(module) == left
    assert torch.equal(module(argument), function(argument))


NOT_REWRITTEN: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda a: aten._to_copy(aten._to_copy(a, dtype=torch.bfloat16), dtype=torch.float32),  # rounds
    lambda a: aten._to_copy(aten._to_copy(a, dtype=torch.int64), dtype=torch.float32),
    lambda a: pad(a[:, 2:], 2, 9) + pad(a[:, :1], 0, 1),  # a hole
    lambda a: pad(a[:, 1:], 1, 9) + pad(a[:, :2], 0, 2),  # an overlap
    lambda a: pad(a[:, 2:], 2, 9) + a,
    lambda a: aten.view(aten.transpose(aten.view(a, [2, 6]), 0, 1).contiguous(), [12]),
    lambda a: aten.expand(aten.slice(a, 1, 0, 1), [3, 4]) / 7,  # wanted large
    lambda a: aten.bitwise_and(aten.new_zeros(a, [], dtype=torch.bool), aten.gt(a, 0)),
]


@pytest.mark.parametrize("function", NOT_REWRITTEN)
def test_what_only_looks_alike_stays(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    traced = make_fx(function, tracing_mode="fake")(x)
    assert ops(cleaned(function, x)) == ops(traced)


@pytest.mark.parametrize(
    ("wider", "narrower", "does"),
    [
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float16, True),
        (torch.float16, torch.bfloat16, False),
        (torch.bfloat16, torch.float16, False),
        (torch.float64, torch.int32, True),
        (torch.float32, torch.int32, False),
        (torch.float16, torch.int8, True),
        (torch.int64, torch.uint8, True),
        (torch.uint8, torch.int8, False),
        (torch.int64, torch.float16, False),
        (torch.bfloat16, torch.bool, True),
        (torch.bool, torch.uint8, False),
    ],
)
def test_which_dtype_holds_which(wider: torch.dtype, narrower: torch.dtype, does: bool) -> None:
    assert holds(wider, narrower) == does


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_models_are_left_without_the_patterns(make: Callable[..., ModelAndInputs]) -> None:
    model, call = make(torch.float32, layers=1)
    graph = trace(model, call).graph_module.graph
    views = (aten.view.default, aten._unsafe_view.default)
    for node in graph.nodes:
        assert node.target not in (aten.detach.default, aten.alias.default, aten.slice_backward.default)
        twice = node.target in views and node.args[0].target in views
        assert not twice, node.format_node()
    keys = [(n.target, str(n.args), str(n.kwargs)) for n in graph.nodes if n.op == "call_function"]
    assert len(keys) == len(set(keys))


def test_random_numbers_are_drawn_as_often_as_before() -> None:
    def draws(a: torch.Tensor) -> torch.Tensor:
        return aten.rand_like(a) + aten.rand_like(a) + aten.bernoulli(a, 0.5) + aten.bernoulli(a, 0.5)

    names = ops(cleaned(draws, x))
    assert names.count("rand_like.default") == 2 and names.count("bernoulli.p") == 2


def test_dead_code_goes_and_arguments_stay() -> None:
    def unused(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        aten.sin(aten.cos(b))
        return aten.neg(a)

    module = cleaned(unused, x, x)
    assert ops(module) == ["neg.default"] and len(module.graph.find_nodes(op="placeholder")) == 2


def test_an_expanded_index_of_a_look_up_is_copied_once() -> None:
    def looked_up(table: torch.Tensor, index: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = aten.expand(index, [3, 4])
        gradient = aten.embedding_dense_backward(g, wide, 5, -1, False)
        return aten.embedding(table, wide), gradient, aten.eq(aten.expand(index, [2, 4]), 1)

    arguments = (torch.randn(5, 2), torch.tensor([[0, 4, 1, 1]]), torch.randn(3, 4, 2))
    module = cleaned(looked_up, *arguments)
    assert sorted(ops(module)) == sorted(
        ["expand.default", "clone.default", "embedding_dense_backward.default", "embedding.default", "expand.default",
         "eq.Scalar"]
    )  # fmt: skip
    for made, expected in zip(module(*arguments), looked_up(*arguments), strict=True):
        assert torch.equal(made, expected)


# -- rows that go to groups and come back ------------------------------------------------------------


def weighed(x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows of x to groups, made something of, weighed there, and back."""
    ops = torch.ops.autopar
    made = aten.exp(ops.to_groups(x, order, ends))
    there = ops.to_groups(weights, order, ends)
    return torch.as_tensor(ops.from_groups(aten.mul(made, aten.unsqueeze(there, -1)), order, ends, 6))


def test_rows_are_weighed_at_home() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(6, 4, generator=draw), torch.randn(6, generator=draw)
    order, ends = torch.tensor([3, 0, 5, 1, 2, 4]), torch.tensor([2, 6])
    module = cleaned(weighed, rows, order, ends, weights)
    assert ops(module) == ["to_groups.default", "exp.default", "from_groups.default", "unsqueeze.default", "mul.Tensor"]
    assert torch.equal(module(rows, order, ends, weights), weighed(rows, order, ends, weights))


def test_a_product_of_what_is_taken_to_groups_is_taken_there_once() -> None:
    """What only looks alike stays: rows that go by another order."""
    groups = torch.ops.autopar

    def both(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        taken = aten.mul(groups.to_groups(x, a, ends), groups.to_groups(y, b, ends))
        return torch.as_tensor(groups.from_groups(aten.exp(taken), a, ends, 4))

    x, order, ends = torch.arange(8.0).view(4, 2), torch.tensor([2, 0, 3, 1]), torch.tensor([1, 4])
    alike = cleaned(lambda x, y, a, ends: both(x, y, a, a, ends), x, x + 1, order, ends)
    assert ops(alike) == ["mul.Tensor", "to_groups.default", "exp.default", "from_groups.default"]
    assert torch.equal(alike(x, x + 1, order, ends), both(x, x + 1, order, order, ends))
    other = cleaned(both, x, x + 1, order, order.flip(0), ends)
    assert ops(other).count("to_groups.default") == 2


# -- tensors that are filled piece by piece ----------------------------------------------------------


def filled(a: torch.Tensor, b: torch.Tensor, start: int = 2) -> torch.Tensor:
    """An empty tensor, of which a is written first and b behind it, as assignments to slices are captured."""
    room = aten.new_empty(a, [3, 4])
    room = aten.slice_scatter(room, aten.copy(aten.slice(room, 1, 0, 2), a), 1, 0, 2)
    return torch.as_tensor(
        aten.slice_scatter(room, aten.copy(aten.slice(room, 1, start, start + 2), b), 1, start, start + 2)
    )


def test_a_tensor_filled_piece_by_piece_is_its_pieces() -> None:
    a, b = x[:, :2].clone(), x[:, 2:].clone()
    module = cleaned(lambda a, b: filled(a, b), a, b)
    assert ops(module) == ["cat.default"]
    assert torch.equal(module(a, b), x)
    partly = cleaned(lambda a, b: filled(a, b, start=1), a, b)  # the last column is never written
    assert "cat.default" not in ops(partly)
