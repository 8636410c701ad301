"""For every family of the table, on 8 devices: no usual layout is predicted to be faster than the plan."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import autopar
from autopar import Infeasible, Plan
from autopar.errors import PinError
from tests.families import FAMILIES
from tests.test_planning import SOLVER_GAP, USUAL, cluster

QUICK = ("convnet1d",)
slow = pytest.mark.slow


@cache
def made(name: str) -> Any:
    """The model and its call."""
    return FAMILIES[name]()


def planned(name: str, time_limit_s: float, **options: Any) -> Plan:
    model, call = made(name)
    return autopar.plan(model, cluster(8), example_inputs=call, time_limit_s=time_limit_s, **options)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=slow) for name in FAMILIES])
def test_never_slower_than_the_usual_layouts(name: str) -> None:
    plan = planned(name, 60)
    compared = []
    for pin in USUAL:
        try:
            usual = planned(name, 10, pin=pin)
        except (Infeasible, PinError):  # a layout that this model cannot take
            continue
        compared.append(pin)
        assert plan.objective_s <= usual.objective_s * (1 + SOLVER_GAP), pin
    assert {"dp": 8, "zero": 0} in compared and {"dp": 8, "zero": 3} in compared
