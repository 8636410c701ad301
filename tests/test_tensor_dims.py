"""Products cut in one to three dimensions: what is sent, and that nothing prescribed is better than what is free."""

from __future__ import annotations

import math
from functools import cache

import pytest

import autopar
from autopar.codegen.emit import emit
from autopar.codegen.traffic import emitted_traffic
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.pricing import price
from autopar.trace import Trace, trace
from autopar.traffic import planned_traffic, sent_bytes
from benchmarks.tensor_products import Scheme, Sizes, layer_theory, measure, scheme_pins, schemes, stack_trace, stored
from tests.models import tiny_llama, tiny_mlp

SIZES = Sizes(rows=64, width=32, inner=128)


@cache
def stack(layers: int) -> Trace:
    return stack_trace(SIZES, layers)


def test_the_schemes() -> None:
    assert [s.name for s in schemes(4)] == ["1D", "2D"]
    assert [s.name for s in schemes(8)] == ["1D", "2D", "2.5D", "3D"]
    assert {s.mesh for s in schemes(64)} == {(64,), (8, 8), (4, 4, 4)}


def test_theory_of_equal_matrices_is_what_is_published() -> None:
    """Per product of three matrices of one size: 6(q-1)/q^3 of that size for 3D (Colossal-AI's documentation); two of
    1D's 2(p-1)/p all-reduces a layer, of the rows x width that Megatron sums."""
    sizes, nbytes = Sizes(64, 64, 64), 64 * 64 * 4
    q = 4
    three = next(s for s in schemes(q**3) if s.name == "3D")
    assert layer_theory(three, sizes) == 2 * nbytes * 6 * (q - 1) / q**3
    for p in (4, 64):
        one = next(s for s in schemes(p) if s.name == "1D")
        assert layer_theory(one, sizes) == 2 * nbytes * 2 * (p - 1) / p


def test_how_theory_scales() -> None:
    """To the leading order: 1D not at all, 2D as p^-1/2, 3D as p^-2/3."""
    sizes = Sizes(1 << 10, 1 << 10, 1 << 10)

    def ratio(name: str, less: int, more: int) -> float:
        found = [next(s for s in schemes(p) if s.name == name) for p in (less, more)]
        return float(layer_theory(found[1], sizes) / layer_theory(found[0], sizes))

    assert ratio("1D", 1 << 6, 1 << 12) == pytest.approx(1, rel=0.02)
    assert ratio("2D", 1 << 10, 1 << 16) == pytest.approx(8**-1, rel=0.04)
    assert ratio("3D", 1 << 12, 1 << 18) == pytest.approx(16**-1, rel=0.06)


@pytest.mark.parametrize("scheme", [*schemes(4), *schemes(8)], ids=lambda s: f"{s.name}-{'x'.join(map(str, s.mesh))}")
def test_emitted_planned_and_theoretical_bytes_are_the_same(scheme: Scheme) -> None:
    cluster = autopar.ClusterSpec.preset("gb200-nvl72", gpus=math.prod(scheme.mesh))
    two, three = (measure(stack(n), cluster, scheme.mesh, scheme_pins(scheme, SIZES)) for n in (2, 3))
    assert three.cuts == (scheme.up, scheme.down)
    expected = layer_theory(scheme, SIZES)
    assert three.emitted_bytes - two.emitted_bytes == expected
    assert three.planned_bytes - two.planned_bytes == expected
    free = measure(stack(3), cluster, scheme.mesh)
    assert free.step_s <= three.step_s * (1 + 1e-3)


def test_how_weights_are_stored() -> None:
    assert stored("MN") == ("S(1)", "S(0)")
    assert stored("MMN") == ("R", "S(1)", "S(0)")
    assert stored("MNK") == ("R", "S(0)", "S(1)")


def test_bytes_of_a_collective() -> None:
    assert sent_bytes("all_reduce", 100, 4) == 150
    assert sent_bytes("all_gather", 100, 4) == sent_bytes("reduce_scatter", 100, 4) == 75
    assert sent_bytes("all_to_all", 100, 4) == 75
    assert sent_bytes("slice", 100, 4) == 0


@pytest.mark.parametrize("name", ["mlp", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh", [(4,), (2, 2), (2, 2, 2)], ids=["4", "2x2", "2x2x2"])
def test_a_model_sends_what_its_plan_pays_for(name: str, mesh: tuple[int, ...]) -> None:
    """Conversions of a whole model, and what lowerings send inside of ops (the loss over a cut vocabulary)."""
    model, call = tiny_mlp() if name == "mlp" else tiny_llama(layers=1)
    traced = trace(model, call)
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=math.prod(mesh))
    pin = {"tp": list(mesh)}
    plan = autopar.plan(model, cluster, example_inputs=call, pin=pin, time_limit_s=5)
    costs = CostModel(cluster, mesh)
    emitted = emitted_traffic(emit(traced, plan.decisions, mesh, costs))
    planned = planned_traffic(price(traced, plan.decisions, costs, OptimizerSpec("adamw")), mesh)
    assert emitted == planned and sum(planned.values()) > 0
