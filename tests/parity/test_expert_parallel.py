"""Experts spread over ranks: simulated ranks against one device, real processes, and what verify makes of mistakes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar.codegen.emit import EmittedProgram
from autopar.codegen.row_exchange import by_rank, counts_of, in_order, sizes
from autopar.codegen.traffic import emitted_traffic
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.errors import PinError, VerifyError
from autopar.grouping import FROM_GROUPS, TO_GROUPS
from autopar.pricing import price
from autopar.sample import sample_values
from autopar.trace import trace
from autopar.traffic import planned_traffic
from autopar.verification import emit_for, match_collectives, verify_program
from tests.families import FAMILIES, causal
from tests.launch import torchrun
from tests.models import HIDDEN, VOCAB, tiny_mlp
from tests.parity.simulate import TOLERANCE, Case, assert_equal_to_eager, make_case, planned
from tests.peaks import assert_as_predicted
from tests.widen import widened

ops = torch.ops.autopar
ROOT = Path(__file__).resolve().parents[2]


qwen3_moe = causal(
    "Qwen3MoeForCausalLM", vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=8, num_key_value_heads=8, head_dim=8, num_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=32, output_router_logits=True, norm_topk_prob=True, experts_implementation="batched_mm",
)  # fmt: skip


@cache
def case(name: str) -> Case:
    """Experts as one grouped product, against the same model with a product per token.

    (In float64 the grouped product has no kernel outside of a capture, so it cannot be its own reference.)
    """
    batched = make_case(*(qwen3_moe() if name == "qwen3_moe" else FAMILIES[name]()))
    model = copy.deepcopy(batched.model)
    model.config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
    traced = widened(trace(model, batched.call))
    values = {k: v.clone() for k, v in sample_values(traced, model, batched.call, seed=0).items()}
    return replace(batched, model=model, traced=traced, values=values)


LAYOUTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "ep2": ((2,), {"ep": 2}),
    "ep4": ((4,), {"ep": 4}),
    "dp2-ep2": ((2, 2), {"dp": 2, "ep": 2}),
    "ep2-tp2": ((2, 2), {"ep": 2, "tp": 2}),
    "dp2-ep2-tp2": ((2, 2, 2), {"dp": 2, "ep": 2, "tp": 2}),
}
QUICK = {
    ("mixtral", "dp2-ep2", "exchange"), ("mixtral", "ep2-tp2", "exchange"), ("mixtral", "ep2", "local"),
    ("qwen3_moe", "ep2", "exchange"), ("deepseek_v3", "ep4", "exchange"),
}  # fmt: skip


def cases() -> Iterator[Any]:
    """(family, layout, how tokens come to experts), families together."""
    for name in ("mixtral", "qwen3_moe", "deepseek_v3", "qwen2_moe"):
        for layout in LAYOUTS:
            for dispatch in ("exchange", "local"):
                marks = () if (name, layout, dispatch) in QUICK else (pytest.mark.slow,)
                yield pytest.param(name, layout, dispatch, marks=marks, id=f"{name}-{layout}-{dispatch}")


@pytest.mark.parametrize(("name", "layout", "dispatch"), list(cases()))
def test_equal_to_one_device(name: str, layout: str, dispatch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss (that of the router, too, where the model has one), all gradients, parameters after five steps."""
    of, (mesh, pin) = case(name), LAYOUTS[layout]
    plan = planned(of, mesh, monkeypatch, pin={**pin, "expert_dispatch": dispatch}, time_limit_s=20)
    assert plan.layout_keys["ep"] == pin["ep"]
    experts = [s for fqn, s in plan.decisions.params.items() if "experts." in fqn and "shared" not in fqn]
    axis = list(pin).index("ep")
    assert experts and all(state[axis] == "S(0)" for state in experts)
    program = emit_for(of.traced, plan)
    exchanged = [n for n in program.forward.nodes if n.target is ops.dispatch_rows.default]
    assert bool(exchanged) == (dispatch == "exchange")
    assert_equal_to_eager(of, plan)


def test_what_is_exchanged_is_what_is_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    of = case("mixtral")
    plan = planned(of, (4,), monkeypatch, pin={"ep": 4, "expert_dispatch": "exchange"})
    costs = CostModel(plan.cluster, plan.mesh)
    priced = price(of.traced, plan.decisions, costs, OptimizerSpec("adamw"))
    assert emitted_traffic(emit_for(of.traced, plan)) == planned_traffic(priced, plan.mesh)
    rows = {n: t for n, t in priced.op_s.items() if "_groups" in n}
    assert rows and all(seconds > 0 for seconds in rows.values())


def test_moves_are_found_in_a_trace() -> None:
    """Tokens to experts, results back, and the same for gradients; no other indexing is left.

    Results are weighed at home, where their weights and the gradients of these are.
    """
    graph = case("mixtral").traced.graph_module.graph
    assert sum(n.target is TO_GROUPS for n in graph.nodes) == 2
    assert sum(n.target is FROM_GROUPS for n in graph.nodes) == 2
    assert all(n.meta["val"].dim() == 2 for n in graph.nodes if n.target in (TO_GROUPS, FROM_GROUPS))
    assert not any(n.target is torch.ops.aten.index_put.default for n in graph.nodes)


# -- the exchange itself ---------------------------------------------------------------------------


def test_rows_arrive_in_the_order_of_groups_and_go_back() -> None:
    """Two ranks, four groups, one of them empty, one rank with nothing for the other."""
    ends = [torch.tensor([2, 2, 3, 4], dtype=torch.int32), torch.tensor([0, 3, 3, 3], dtype=torch.int32)]
    rows = [torch.tensor([0.0, 1.0, 20.0, 30.0]), torch.tensor([10.0, 11.0, 12.0])]
    sent = [counts_of(e, 2) for e in ends]
    received = [torch.stack([s[i] for s in sent]) for i in range(2)]
    blocks = [r.split(sizes(s)) for r, s in zip(rows, sent, strict=True)]
    got = [in_order(torch.cat([b[i] for b in blocks]), received[i].tolist()) for i in range(2)]
    assert got[0].tolist() == [0.0, 1.0, 10.0, 11.0, 12.0] and got[1].tolist() == [20.0, 30.0]
    back = [by_rank(g, r.tolist()).split(sizes(r)) for g, r in zip(got, received, strict=True)]
    for rank in range(2):
        assert torch.equal(torch.cat([b[rank] for b in back]), rows[rank])


@pytest.mark.parametrize(
    ("processes", "arguments"), [(2, ()), pytest.param(4, (), marks=pytest.mark.slow),
                                 pytest.param(4, ("--ep", "4"), marks=pytest.mark.slow)]
)  # fmt: skip
def test_on_real_processes(processes: int, arguments: tuple[str, ...]) -> None:
    ended = torchrun(ROOT / "examples" / "experts.py", processes, *arguments)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = re.search(r"largest difference from one device: (\S+)", ended.stdout)
    assert found and float(found.group(1)) <= TOLERANCE, ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_what_a_rank_holds_is_predicted(processes: int) -> None:
    """On the example, whatever rows its router sends where: the plan counts as many for every expert."""
    assert_as_predicted("experts", processes)


# -- mistakes --------------------------------------------------------------------------------------


def exchanging(monkeypatch: pytest.MonkeyPatch) -> tuple[Case, autopar.Plan, EmittedProgram]:
    of = case("mixtral")
    plan = planned(of, (2,), monkeypatch, pin={"ep": 2, "expert_dispatch": "exchange"})
    return of, plan, emit_for(of.traced, plan)


def test_verify_catches_rows_that_go_back_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    of, plan, program = exchanging(monkeypatch)
    verify_program(of.traced, plan.decisions, program, of.values)
    node = next(n for n in program.forward.nodes if n.target is ops.combine_rows.default)
    with program.forward.inserting_before(node):
        turned = program.forward.call_function(torch.ops.aten.flip.default, (node.args[0], [0]))
    turned.meta["val"] = node.args[0].meta["val"]  # type: ignore[union-attr]
    node.replace_input_with(node.args[0], turned)  # type: ignore[arg-type]
    with pytest.raises(VerifyError, match="from_groups"):
        verify_program(of.traced, plan.decisions, program, of.values)


def test_verify_catches_a_rank_that_does_not_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    of, plan, program = exchanging(monkeypatch)
    other = emit_for(of.traced, plan)
    node = next(n for n in other.forward.nodes if n.target is ops.dispatch_rows.default)
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    other.forward.erase_node(node)
    match_collectives([program, program], plan.mesh)
    with pytest.raises(VerifyError, match=r"match|deadlock"):
        match_collectives([program, other], plan.mesh)


@pytest.mark.parametrize(
    ("pin", "gpus", "says"),
    [
        ({"ep": 3}, 3, "8 experts cannot be spread evenly; choose a divisor of 8"),
        ({"ep": 16}, 16, "8 experts cannot be spread evenly"),
        ({"ep": 2, "expert_dispatch": "drop"}, 2, "must be exchange, local or data"),
        ({"dp": 2, "expert_dispatch": "local"}, 2, "beside a pinned ep"),
    ],
)
def test_pins_that_cannot_be(pin: dict[str, Any], gpus: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = case("mixtral")
    monkeypatch.setattr(autopar.api, "trace", lambda model, call: of.traced)
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=gpus)
    with pytest.raises(PinError) as error:
        autopar.plan(of.model, cluster, example_inputs=of.call, pin=pin)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_model_without_experts() -> None:
    model, call = tiny_mlp()
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=2)
    with pytest.raises(PinError, match=r'no grouped products over experts.*"grouped_mm"'):
        autopar.plan(model, cluster, example_inputs=call, pin={"ep": 2})
