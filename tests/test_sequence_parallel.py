"""`sp` beside tensor ranks: what lies between their products is cut along the sequence, as Megatron-LM has it.

Seen in what a rank sends and saves of plans made through the public face; `sp: False` is Megatron without it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import autopar
from autopar.codegen.emit import EmittedProgram
from autopar.codegen.traffic import emitted_traffic
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.errors import PinError
from autopar.explaining.workbench import with_known_rules
from autopar.placements import local_shape
from autopar.plans import Plan
from autopar.pricing import price
from autopar.trace import Trace, trace
from autopar.traffic import planned_traffic
from autopar.verification import emit_for
from tests.models import BATCH, HIDDEN, ModelAndInputs, tiny_bert, tiny_llama, tiny_mlp
from tests.parity.simulate import assert_equal_to_eager, make_case
from tests.pipeline.models import DEEP

SEQUENCE, ITEM = 16, 8  # bytes of a float64
STREAM = BATCH * SEQUENCE * HIDDEN * ITEM  # what lies between two products, whole
SMALL = 40 * HIDDEN * ITEM  # weights and biases of all norms, and losses


def made(call: ModelAndInputs, ranks: int, pin: dict[str, Any]) -> tuple[Trace, Plan, EmittedProgram]:
    model, inputs = call
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=ranks)
    plan = autopar.plan(model, cluster, example_inputs=inputs, pin=pin)
    traced = trace(model, inputs)
    return traced, plan, emit_for(traced, plan)


def by_kind(emitted: EmittedProgram, axis: int) -> Counter[str]:
    """Bytes that a rank sends on an axis."""
    return Counter({kind: nbytes for (kind, a), nbytes in emitted_traffic(emitted).items() if a == axis})


def saved_streams(traced: Trace, emitted: EmittedProgram) -> set[int]:
    """Bytes of what waits for the backward pass and is, whole, a vector of the stream for every token."""
    wholes = {n.name: _first(n) for n in traced.graph_module.graph.nodes if n.op == "call_function"}
    saved = [(wholes[name].shape, state) for name, state in emitted.saved if name in wholes]
    local = [local_shape(shape, state, emitted.mesh) for shape, state in saved if shape == (BATCH, SEQUENCE, HIDDEN)]
    return {math.prod(shape) * ITEM for shape in local if shape is not None}


@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_are_scattered_and_parts_gathered(ranks: int) -> None:
    traced, plan, emitted = made(tiny_llama(layers=1), ranks, {"tp": ranks, "sp": True})
    assert plan.layout_keys["sp"] and plan.roles == ("tp",)
    sent, part = by_kind(emitted, 0), STREAM * (ranks - 1) // ranks
    assert sent["all_reduce"] < SMALL < part
    assert sent["reduce_scatter"] >= 5 * part  # of two products on the way there, of the head and two on the way back
    assert sent["all_gather"] >= 7 * part  # two for products of each pass, the head's, and these three once more
    costs = CostModel(plan.cluster, plan.mesh)
    decisions = with_known_rules(traced, plan.decisions, plan.mesh)
    assert emitted_traffic(emitted) == planned_traffic(
        price(traced, decisions, costs, OptimizerSpec("adamw")), plan.mesh
    )


@pytest.mark.parametrize("name", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gpt2", "t5"))])
def test_norms_and_sums_hold_their_part(name: str) -> None:
    """On the device and between the passes, and in every op but products."""
    call = tiny_bert(layers=1) if name == "bert" else DEEP[name](2)()
    traced, plan, emitted = made(call, 2, {"tp": 2, "sp": True})
    whole = (BATCH, SEQUENCE, HIDDEN)
    norms = [n for n in traced.graph_module.graph.nodes if n.name in plan.decisions.nodes]
    norms = [n for n in norms if any(word in str(n.target) for word in ("norm", "rsqrt", "add.Tensor", "dropout"))]
    states = [plan.decisions.nodes[n.name].result_states[0] for n in norms if _first(n).shape[:2] == whole[:2]]
    assert len(states) > 4 and not any(state == ("R",) for state in states)
    assert saved_streams(traced, emitted) == {STREAM // 2}


def _first(node: torch.fx.Node) -> torch.Tensor:
    value = node.meta["val"]
    found: torch.Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return found


def test_without_it_sums_go_everywhere() -> None:
    traced, plan, emitted = made(tiny_llama(layers=1), 2, {"tp": 2, "sp": False})
    sent = by_kind(emitted, 0)
    assert not plan.layout_keys["sp"]
    assert sent["all_reduce"] >= 4 * STREAM and not sent["all_to_all"]
    assert saved_streams(traced, emitted) == {STREAM}


def test_sequences_that_do_not_divide() -> None:
    model, (args, named) = tiny_llama(layers=1)
    call = args, {name: value[:, :15] for name, value in named.items()}
    with pytest.raises(PinError, match=r"pin sp=True: 15 tokens do not divide by the 2 tensor .* ranks.*pin sp=False"):
        made((model, call), 2, {"tp": 2, "sp": True})
    made((model, call), 2, {"tp": 2, "sp": False})


def test_a_model_without_sequences_has_nothing_to_cut() -> None:
    _, plan, _ = made(tiny_mlp(), 2, {"tp": 2, "sp": True})
    assert not plan.layout_keys["sp"]


CASES: list[tuple[str, Callable[[], ModelAndInputs], int, dict[str, Any]]] = [
    ("llama", lambda: tiny_llama(layers=1), 4, {"tp": 4, "sp": True}),
    ("llama", lambda: tiny_llama(layers=2), 8, {"dp": 2, "tp": 4, "sp": True}),
    ("llama", lambda: tiny_llama(layers=1), 8, {"cp": 2, "tp": 4, "sp": True}),
    ("llama", lambda: tiny_llama(layers=1), 8, {"tp": (2, 4), "sp": True}),
    ("gpt2", DEEP["gpt2"](2), 4, {"tp": 4, "sp": True}),
    ("gpt2", DEEP["gpt2"](2), 8, {"tp": 8, "sp": True}),
    ("bert", lambda: tiny_bert(layers=1), 4, {"dp": 2, "tp": 2, "sp": True}),
    ("bert", lambda: tiny_bert(layers=1), 8, {"tp": 8, "sp": True}),
    ("t5", DEEP["t5"](2), 4, {"tp": 4, "sp": True}),
    ("t5", DEEP["t5"](2), 8, {"dp": 4, "tp": 2, "sp": True, "zero": 3}),
    ("llama", lambda: tiny_llama(layers=1), 8, {"dp": 4, "tp": 2, "sp": False}),
]


@pytest.mark.parametrize(
    ("name", "make", "ranks", "pin"),
    [pytest.param(*case, marks=() if at == 0 else pytest.mark.slow) for at, case in enumerate(CASES)],
    ids=lambda value: str(value) if isinstance(value, (str, int, dict)) else "",
)
def test_trains_as_on_one_device(
    name: str, make: Callable[[], ModelAndInputs], ranks: int, pin: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradients and parameters after five steps, in float64 to nine digits."""
    of = make_case(*make())
    monkeypatch.setattr(autopar.api, "trace", lambda model, call: of.traced)
    plan = autopar.plan(of.model, autopar.ClusterSpec.preset("cpu", gpus=ranks), example_inputs=of.call, pin=pin)
    assert plan.layout_keys["sp"] is pin["sp"]
    assert_equal_to_eager(of, plan)
