"""Every rank simulated, against the eager model: loss, gradients, and parameters after five AdamW steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from autopar.errors import Infeasible
from autopar.pins import weight_slots
from autopar.placements import State, shard_dim
from autopar.plans import Plan
from autopar.sample import sample_values
from autopar.trace import Trace, trace
from autopar.verification import gradient_errors, relative_error, run_reference
from tests.models import ModelAndInputs, tiny_bert, tiny_llama, tiny_mlp
from tests.parity.simulate import Case, assert_equal_to_eager, make_case, mixed, planned, train

MESHES = [(2,), (4,), (2, 2), (2, 4)]
MODELS: dict[str, Callable[[], ModelAndInputs]] = {
    "llama": lambda: tiny_llama(layers=1),
    "bert": lambda: tiny_bert(layers=1),
    "mlp": tiny_mlp,
}
everywhere = pytest.mark.parametrize("mesh", MESHES, ids=lambda m: "x".join(map(str, m)))
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def case(name: str) -> Case:
    """Traced and trained once for all tests."""
    return make_case(*MODELS[name]())


# -- the plans -----------------------------------------------------------------------------


@every_model
@everywhere
def test_free_plan(name: str, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(name)
    plan = planned(of, mesh, monkeypatch)
    for node, states in weight_uses(of.traced, plan):
        assert any(shard_dim(p) is not None for state in states for p in state), f"{node} is not cut at all"
    assert_equal_to_eager(of, plan)


@every_model
@everywhere
def test_tensor_parallel(name: str, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(name)
    pin = {"tp": mesh[-1]} if len(mesh) == 1 else {"dp": mesh[0], "tp": mesh[1]}
    plan = planned(of, mesh, monkeypatch, pin=pin)
    slots = {n.name: weight_slots(n, of.traced) for n in of.traced.graph_module.graph.nodes if n.op == "call_function"}
    for node, states in weight_uses(of.traced, plan):
        for slot in slots[node]:
            assert shard_dim(states[slot][-1]) is not None, f"{node} uses a whole weight"
    assert_equal_to_eager(of, plan)


@every_model
@everywhere
def test_mixed_sharding(name: str, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(name)
    pins = mixed(of.traced, mesh)
    plan = planned(of, mesh, monkeypatch, pin={"mesh": list(mesh), **pins})
    assert plan.decisions.params == pins
    assert_equal_to_eager(of, plan)


def tight_cases() -> Iterator[Any]:
    """All models on all meshes; finding the least memory takes long but for the smallest."""
    for name, mesh in itertools.product(MODELS, MESHES):
        quick = name == "mlp" and len(mesh) == 1
        marks = () if quick else (pytest.mark.slow,)
        yield pytest.param(name, mesh, marks=marks, id=f"{name}-{'x'.join(map(str, mesh))}")


@pytest.mark.parametrize(("name", "mesh"), list(tight_cases()))
def test_tightest_memory_limit(name: str, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    of = case(name)
    with pytest.raises(Infeasible) as error:
        planned(of, mesh, monkeypatch, memory_limit_bytes=1)
    needed = error.value.needed_bytes
    assert needed is not None
    plan = planned(of, mesh, monkeypatch, memory_limit_bytes=needed)
    assert plan.predicted["peak_bytes"] <= needed
    assert_equal_to_eager(of, plan)


def weight_uses(traced: Trace, plan: Plan) -> Iterator[tuple[str, tuple[State, ...]]]:
    """(node, operand states) of every matrix product or lookup that uses a weight."""
    for node in traced.graph_module.graph.nodes:
        if node.op == "call_function" and weight_slots(node, traced):
            yield node.name, plan.decisions.nodes[node.name].operand_states


# -- the widening itself -------------------------------------------------------------------


@every_model
def test_widened_trace_is_the_widened_eager_model(name: str) -> None:
    of = case(name)
    values = run_reference(of.traced, of.values)
    assert relative_error(values[of.traced.loss], of.losses[0]) <= 1e-12
    errors = gradient_errors({f: values[n] for f, n in of.traced.grads.items()}, of.grads)
    assert max(errors.values()) <= 1e-12
    narrow = [n.name for n in of.traced.graph_module.graph.nodes if _dtype(n) == torch.float32]
    assert not narrow


def test_unmodified_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its casts to float32 left in place, Llama agrees as far as float32 does."""
    model, call = MODELS["llama"]()
    traced = trace(model, call)
    assert any(_dtype(n) == torch.float32 for n in traced.graph_module.graph.nodes)
    loss = model(**call[1])["loss"]
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    of = Case(model, call, traced, sample_values(traced, model, call, seed=0), [], {}, {}, {})
    plan = planned(of, (2, 2), monkeypatch, pin={"dp": 2, "tp": 2})
    trained = train(of, plan)
    assert relative_error(trained.losses[0], loss.detach()) <= 2e-6
    assert max(gradient_errors(trained.grads, grads).values()) <= 2e-6


def _dtype(node: torch.fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


class BiasedPair(torch.nn.Module):
    """A column-parallel layer and a row-parallel one, both with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(16, 32, dtype=torch.float64)
        self.down = torch.nn.Linear(32, 16, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 16]."""
        return self.down(torch.nn.functional.gelu(self.up(x))).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("mesh", [(2,), (3,), (2, 2)], ids=["2", "3", "2x2"])
def test_each_rank_adds_its_share_of_a_bias(mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    size = 48 if 3 in mesh else 32
    model = BiasedPair()
    if size != 32:
        model.up, model.down = (torch.nn.Linear(a, b, dtype=torch.float64) for a, b in ((16, size), (size, 16)))
    of = make_case(model, ((torch.randn(6, 16, dtype=torch.float64),), {}))
    cut = {"up.weight": ("S(0)",) * len(mesh), "down.weight": ("S(1)",) * len(mesh)}
    plan = planned(of, mesh, monkeypatch, pin={"mesh": list(mesh), **cut})
    lowered = [r.lowering for d in plan.decisions.nodes.values() for r in d.rules]
    assert "shared_bias" in lowered
    assert_equal_to_eager(of, plan)
