"""Sequences cut over ranks: an unmodified model under a context pin, against the eager model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from autopar.plans import Plan
from autopar.rules.ring import RING, RING_BACKWARD
from tests.models import ModelAndInputs, tiny_llama
from tests.parity.simulate import Case, assert_equal_to_eager, make_case, planned

MODELS: dict[str, Callable[[], ModelAndInputs]] = {"llama": lambda: tiny_llama(layers=1)}
LAYOUTS = {
    "cp2": ((2,), {"cp": 2}),
    "cp4": ((4,), {"cp": 4}),
    "dp2-cp2": ((2, 2), {"dp": 2, "cp": 2}),
    "cp2-tp2": ((2, 2), {"cp": 2, "tp": 2}),
    "cp4-tp2": ((4, 2), {"cp": 4, "tp": 2}),
}


@cache
def case(name: str) -> Case:
    """Traced and trained once for all tests."""
    return make_case(*MODELS[name]())


def lowerings(plan: Plan) -> set[str]:
    """All that the plan uses."""
    return {rule.lowering for decision in plan.decisions.nodes.values() for rule in decision.rules}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_context_parallel(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, pin = LAYOUTS[layout]
    plan = planned(case(name), mesh, monkeypatch, pin=pin)
    assert {role: plan.layout()[role] for role in pin} == pin
    assert {RING, RING_BACKWARD} <= lowerings(plan)
    assert_equal_to_eager(case(name), plan)
