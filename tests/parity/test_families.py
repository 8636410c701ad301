"""Every family of the compatibility table, on simulated ranks, against the eager model.

The quick set has one or two plans of every promised family and of some others; the slow set has all plans of all
families on all meshes, and the leanest plans on them.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

import autopar
from autopar.errors import Infeasible
from autopar.placements import State, in_groups, local_shape, replicated
from autopar.sample import sample_values
from autopar.trace import Trace, trace
from autopar.tracing.capture import find_loss
from autopar.verification import gradient_errors, relative_error
from tests.families import FAMILIES, NAMED
from tests.parity.simulate import TOLERANCE, Case, assert_equal_to_eager, make_case, mixed, planned
from tests.widen import widened

MESHES = [(2,), (4,), (2, 2), (2, 4)]
PLANS = ("free", "pinned", "mixed")
ONE_QUICK_PLAN = ("gemma3", "t5", "mixtral", "mamba", "qwen3", "mistral", "olmo2", "gpt_neox", "opt")
TIME_LIMIT_S = 10.0  # parity does not need the best plan


@cache
def case(name: str) -> Case:
    """Traced and trained once for all tests of a family that run in a row."""
    return make_case(*FAMILIES[name]())


def quick_cases(name: str) -> set[tuple[str, tuple[int, ...]]]:
    """Two for a promised family, one for those that are large or much like another, and for some others, by turns."""
    turn = list(FAMILIES).index(name)
    if name in ONE_QUICK_PLAN:
        return {("free", (4,))}
    if name in NAMED:
        return {("free", (2, 2)), (PLANS[1 + turn % 2], (2,))}
    return {(PLANS[turn % 3], MESHES[turn % 2])} if turn % 3 == 0 else set()


def cases() -> Iterator[Any]:
    """(family, plan, mesh), families together."""
    for name in FAMILIES:
        for plan, mesh in itertools.product(PLANS, MESHES):
            marks = () if (plan, mesh) in quick_cases(name) else (pytest.mark.slow,)
            yield pytest.param(name, plan, mesh, marks=marks, id=f"{name}-{plan}-{'x'.join(map(str, mesh))}")


def pinned(traced: Trace, mesh: tuple[int, ...]) -> dict[str, State]:
    """The largest parameter that divides, cut along its last dim that does, on all axes."""
    for param in sorted(traced.params, key=lambda p: -math.prod(p.shape)):
        for dim in reversed(range(len(param.shape))):
            state = (f"S({dim})",) * len(mesh)
            if local_shape(param.shape, state, mesh) is not None:
                return {param.fqn: state}
    raise AssertionError(f"no parameter can be cut by {mesh}")


@pytest.mark.parametrize(("name", "kind", "mesh"), list(cases()))
def test_equal_to_one_device(name: str, kind: str, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(name)
    pins = {"free": {}, "pinned": pinned(of.traced, mesh), "mixed": mixed(of.traced, mesh)}[kind]
    pin = {"mesh": list(mesh), **pins}
    plan = planned(of, mesh, monkeypatch, pin=pin, time_limit_s=TIME_LIMIT_S)
    assert {fqn: plan.decisions.params[fqn] for fqn in pins} == pins
    assert cut_ops(plan), "nothing runs in parts"
    assert_equal_to_eager(of, plan)


@pytest.mark.parametrize("name", [name for name in FAMILIES if quick_cases(name)])
def test_on_one_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single rank has no axes, no groups and no conversions, and still a program, through the face."""
    of = case(name)
    monkeypatch.setattr(autopar.api, "trace", lambda model, call: of.traced)
    cluster = autopar.ClusterSpec.preset("cpu", gpus=1)
    program = autopar.compile(of.model, cluster, example_inputs=of.call, time_limit_s=TIME_LIMIT_S)
    loss = find_loss(program(*of.call[0], **of.call[1]))
    loss.backward()
    assert relative_error(loss.detach(), of.losses[0]) <= TOLERANCE
    grads = {n: p.grad for n, p in program.named_parameters() if p.grad is not None}
    assert grads.keys() == of.grads.keys()
    errors = gradient_errors(grads, of.grads)
    worst = max(errors, key=lambda k: errors[k])
    assert errors[worst] <= TOLERANCE, f"{worst} is off by {errors[worst]:.1e}"


N_DIMENSIONAL = [(2, 2), (2, 2, 2)]
QUICK_N_DIMENSIONAL = {("mlp", (2, 2, 2)), ("llama", (2, 2)), ("gpt2", (2, 2))}


def n_dimensional() -> Iterator[Any]:
    """(family, mesh)."""
    for name, mesh in itertools.product(("mlp", "llama", "gpt2", "t5", "mixtral", "resnet"), N_DIMENSIONAL):
        marks = () if (name, mesh) in QUICK_N_DIMENSIONAL else (pytest.mark.slow,)
        yield pytest.param(name, mesh, marks=marks, id=f"{name}-{'x'.join(map(str, mesh))}")


@pytest.mark.parametrize(("name", "mesh"), list(n_dimensional()))
def test_tensor_parallel_by_axes(name: str, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every axis cuts weights, each its own way."""
    of = case(name)
    plan = planned(of, mesh, monkeypatch, pin={"tp": mesh}, time_limit_s=4 * TIME_LIMIT_S)
    assert plan.roles == ("tp",) * len(mesh)
    assert_equal_to_eager(of, plan)


@pytest.mark.parametrize("mesh", [(2,), pytest.param((2, 2), marks=pytest.mark.slow)], ids=["2", "2x2"])
def test_grouped_experts(mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in one grouped product, cut by rows, against the same model with a product per row.

    (In float64 the grouped product has no kernel outside of a capture, so it cannot be its own reference.)
    """
    batched = case("mixtral")
    model = copy.deepcopy(batched.model)
    model.config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
    traced = widened(trace(model, batched.call))
    values = {k: v.clone() for k, v in sample_values(traced, model, batched.call, seed=0).items()}
    of = replace(batched, model=model, traced=traced, values=values)
    experts = {p.fqn: ("R",) * len(mesh) for p in traced.params if "experts" in p.fqn}
    plan = planned(of, mesh, monkeypatch, pin={"mesh": list(mesh), **experts}, time_limit_s=TIME_LIMIT_S)
    rules = [r for d in plan.decisions.nodes.values() for r in d.rules]
    own_rows = [r for r in rules if any(p is not None and in_groups(p) for p in (*r.inputs, *r.outputs))]
    assert own_rows or "grouped_rows" in [r.lowering for r in rules]
    assert_equal_to_eager(of, plan)


def cut_ops(plan: autopar.Plan) -> list[str]:
    """Ops of which a rank makes a part only."""
    whole = (replicated(len(plan.mesh)), None)
    return [name for name, d in plan.decisions.nodes.items() if any(s not in whole for s in d.result_states)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
@pytest.mark.parametrize("name", FAMILIES)
def test_in_the_least_memory(name: str, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(name)
    with pytest.raises(Infeasible) as error:
        planned(of, mesh, monkeypatch, memory_limit_bytes=1, time_limit_s=TIME_LIMIT_S)
    needed = error.value.needed_bytes
    assert needed is not None
    plan = planned(of, mesh, monkeypatch, memory_limit_bytes=needed, time_limit_s=TIME_LIMIT_S)
    assert plan.predicted["peak_bytes"] <= needed
    assert_equal_to_eager(of, plan)
