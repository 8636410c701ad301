"""Experts over the ranks that share sequences: tokens of a part of a sequence find their experts, op by op and in
stages, against the single device, through the face."""

from __future__ import annotations

from typing import Any

import pytest

import autopar
import autopar.api
import autopar.verification
from autopar.choosing.plan import choose
from autopar.errors import AutoparError, Infeasible
from autopar.pins import parse_pins
from autopar.placements import in_groups, shard_dim
from autopar.plans import Plan
from autopar.predicting.predict import Predictor
from autopar.staged import StagedPlan
from autopar.trace import trace
from tests.pipeline.test_expert_stages import BATCH, SEQ, assert_as_on_one_device, model
from tests.widen import widened


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_double(model: Any, call: Any, **options: Any) -> Any:
        return widened(trace(model, call, **options))

    monkeypatch.setattr(autopar.api, "trace", in_double)
    monkeypatch.setattr(autopar.verification, "trace", in_double)


def plan_of(family: str, devices: int, pin: dict[str, Any]) -> Plan:
    cluster = autopar.ClusterSpec.preset("cpu", gpus=devices)
    return Plan.loads(autopar.plan(model(family), cluster, seq=SEQ, global_batch=BATCH, pin=pin).dumps())


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("mixtral", 2, {"cp": 2, "ep": 2}),
    ("mixtral", 4, {"cp": 4, "ep": 4}),
    ("mixtral", 4, {"pp": 2, "cp": 2, "ep": 2, "micro_batch": 4}),
    ("mixtral", 8, {"pp": 2, "dp": 2, "cp": 2, "ep": 2, "micro_batch": 2, "zero": 1}),
    ("qwen3_moe", 4, {"dp": 2, "cp": 2, "ep": 2, "zero": 3}),
    ("qwen3_moe", 8, {"dp": 4, "cp": 2, "ep": 2}),
    ("qwen3_moe", 4, {"pp": 2, "cp": 2, "ep": 2, "micro_batch": 2, "recompute": "full"}),
    ("qwen3_moe", 8, {"pp": 2, "cp": 2, "ep": 2, "tp": 2, "micro_batch": 4, "schedule": "zero-bubble"}),
]


@pytest.mark.parametrize(
    ("family", "devices", "pin"),
    [pytest.param(*case, marks=() if at == 0 else pytest.mark.slow) for at, case in enumerate(CASES)],
    ids=lambda value: str(value),
)
def test_equal_to_one_device(family: str, devices: int, pin: dict[str, Any]) -> None:
    plan = plan_of(family, devices, pin)
    axis = plan.roles.index("cp")
    assert "ep" not in plan.roles
    assert (plan.layout_keys["ep"], plan.layout_keys["cp"]) == (pin["ep"], pin["cp"])
    assert all(plan.decisions.params[fqn][axis] == "S(0)" for fqn in plan.decisions.params if ".experts." in fqn)
    assert_as_on_one_device(family, devices, plan)


def test_rows_of_a_part_of_each_sequence_are_exchanged() -> None:
    """Nobody holds the rows of all tokens, before the exchange or after."""
    plan = plan_of("mixtral", 2, {"cp": 2, "ep": 2})
    traced = trace(model("mixtral"), sample(SEQ))
    rows = 2 * BATCH * SEQ  # each token goes to two experts
    states = [
        (state[0], node.name)
        for node in traced.graph_module.graph.nodes
        if node.name in plan.decisions.nodes and getattr(node.meta["val"], "shape", (0,))[:1] == (rows,)
        for state in plan.decisions.nodes[node.name].result_states
        if state is not None and node.meta["val"].dim() == 2
    ]
    assert {state[0] for state, _ in states} >= {"E"}
    assert not [name for state, name in states if state == "R" or (not in_groups(state) and shard_dim(state) is None)]


def sample(seq: int) -> Any:
    import torch

    ids = torch.zeros(BATCH, seq, dtype=torch.int64)
    return (), {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize(
    ("pin", "devices", "mesh", "roles", "together"),
    [
        ({"cp": 2, "ep": 2}, 2, (2,), ("cp",), True),
        ({"dp": 2, "cp": 2, "ep": 2}, 4, (2, 2), ("dp", "cp"), True),
        ({"dp": 4, "cp": 2, "ep": 4}, 8, (2, 4), ("cp", "ep"), False),  # as many as data ranks
        ({"cp": 2, "ep": 2}, 4, (2, 2), ("cp", "ep"), False),  # an axis each
    ],
)
def test_which_ranks_hold_experts(
    pin: dict[str, Any], devices: int, mesh: tuple[int, ...], roles: tuple[str, ...], together: bool
) -> None:
    request = parse_pins(pin, devices)
    assert (request.mesh, request.roles, request.experts_on_context) == (mesh, roles, together)


@pytest.mark.slow
def test_experts_over_data_and_context_ranks_are_priced_only() -> None:
    pin = {"pp": 1, "dp": 2, "cp": 2, "ep": 4, "micro_batch": 4}
    plan = plan_of("mixtral", 4, pin)
    assert isinstance(plan, StagedPlan)
    with pytest.raises(AutoparError, match=r"some of its context and some of its data ranks .*pin ep=2, a divisor"):
        autopar.compile(model("mixtral"), autopar.ClusterSpec.preset("cpu", gpus=4), plan=plan)


def test_what_is_chosen_to_run_has_experts_on_ranks_of_one_kind() -> None:
    """`plan` may price experts on some of both kinds of ranks, which no program has; `compile` looks for others."""
    cluster = autopar.ClusterSpec.preset("cpu", gpus=8)
    predictor = Predictor(model("mixtral"), cluster, seq=SEQ, global_batch=BATCH)
    both = {"cp": 2, "dp": 2, "ep": 4, "tp": 2}
    assert choose(predictor, both, 10.0).best.layout.ep == 4
    with pytest.raises(Infeasible, match=r"ep=4 neither divides dp nor is cp, and experts on some of both ranks"):
        choose(predictor, both, 10.0, to_run=True)
    found = choose(predictor, {"cp": 2, "ep": 4}, 10.0, to_run=True).best.layout
    assert found.dp % 4 == 0
