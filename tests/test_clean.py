"""Cleaning a joint graph: what goes, what stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.tracing.clean import clean

aten = torch.ops.aten


def cleaned(function: Callable[..., Any], *args: torch.Tensor, backward: str | None = None) -> fx.GraphModule:
    """The cleaned graph of `function`; nodes whose name starts with `backward` are put in the backward phase."""
    module = make_fx(function)(*args)
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


def test_equal_expressions_are_shared_within_a_phase_only() -> None:
    def twice(a: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return aten.sin(a), aten.sin(a), aten.mul(a, 2), aten.mul(a, 2.0), aten.cos(a), aten.cos(a)

    assert ops(cleaned(twice, x)) == ["sin.default", "mul.Tensor", "mul.Tensor", "cos.default"]
    apart = ops(cleaned(twice, x, backward="cos_1"))
    assert apart.count("cos.default") == 2 and apart.count("sin.default") == 1


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
