"""The report: what it says is what solving again says, and what it does not know it does not say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

import autopar
from autopar import AutoparError, ClusterSpec, Infeasible, Plan, PlanMismatch
from autopar.cost.compute import OpClass
from autopar.cost.model import CostModel
from autopar.explain import Report
from autopar.explaining.alternatives import Alternative
from autopar.explaining.attribution import COMPUTE, LAUNCH, MEMORY, roofline_parts
from autopar.explaining.memory_price import FIRST_STEP, TOLERANCE
from autopar.explaining.text import WIDTH, short_title
from autopar.units import seconds_text
from tests.models import tiny_llama, tiny_mlp
from tests.test_planning import MODELS, SOLVER_GAP, cluster, free, make


@cache
def report() -> Report:
    return free("mlp").explain()


def far(**options: Any) -> Plan:
    """A plan of the small MLP where the latency of links counts, so that the fastest plan is not the leanest, too."""
    model, call = MODELS["mlp"]()
    spec = cluster(8)
    links = tuple(replace(link, latency_s=1e-7) for link in spec.links)
    spec = replace(spec, links=links, collective_launch_s=1e-7)
    return autopar.plan(model, spec, example_inputs=call, **{"time_limit_s": 30, "pin": {"mesh": [8]}, **options})


@cache
def binding() -> Plan:
    """Under a limit between what it would like and what it needs at least."""
    with pytest.raises(Infeasible) as error:
        far(memory_limit_bytes=1000, time_limit_s=2)
    least = error.value.needed_bytes
    assert least is not None
    return far(memory_limit_bytes=(2 * far().predicted["peak_bytes"] + 3 * least) // 5)


def changes_add_up(alternative: Alternative) -> bool:
    total = sum(c.extra_s for c in alternative.changes)
    return total == pytest.approx(alternative.extra_s, rel=1e-6, abs=1e-15)


# -- where time goes ------------------------------------------------------------------------


@pytest.mark.parametrize("pin", [None, {"dp": 2, "tp": 4, "zero": 3, "recompute": "full"}, {"tp": 8}])
def test_parts_add_up_to_the_step(pin: dict[str, Any] | None) -> None:
    plan = make("mlp", pin=pin, time_limit_s=5)
    found = plan.explain().attribution
    for parts in (found.by_resource, found.by_cost):
        assert sum(parts.values()) == pytest.approx(plan.objective_s, rel=1e-9)
        assert all(seconds >= 0 for seconds in parts.values())
    assert {MEMORY, LAUNCH} <= set(found.by_resource)
    ops = sum(g.seconds for g in found.op_groups)
    assert ops == pytest.approx(plan.predicted["breakdown"]["forward_s"] + plan.predicted["breakdown"]["backward_s"])
    again = sum(g.again_s for g in found.op_groups)
    assert again == pytest.approx(plan.predicted["breakdown"]["recompute_s"])
    assert (again > 0) == (pin is not None and "recompute" in pin)


def test_links_are_named_by_what_they_span() -> None:
    plan = make("mlp", gpus=16, pin={"dp": 2, "tp": 8}, time_limit_s=5)
    links = [name for name in plan.explain().attribution.by_resource if name.startswith("link")]
    assert "link of axis 1 (8 ranks)" in links and "link of axis 0 (2 ranks, 2 nodes)" in links


@pytest.mark.parametrize(
    ("kind", "flops", "nbytes", "waits_for"),
    [
        (OpClass.MATMUL, 1e13, 1e6, COMPUTE),
        (OpClass.MATMUL, 1e6, 1e9, MEMORY),
        (OpClass.ELEMENTWISE, 0.0, 1e9, MEMORY),
        (OpClass.ELEMENTWISE, 0.0, 10.0, LAUNCH),
        (OpClass.ATTENTION, 1e13, 1e6, COMPUTE),
        (OpClass.VIEW, 0.0, 1e9, None),
    ],
)
def test_roofline_parts(kind: OpClass, flops: float, nbytes: float, waits_for: str | None) -> None:
    costs = CostModel(ClusterSpec.preset("h100-sxm", gpus=8), (8,))
    parts = roofline_parts(costs, kind, flops, nbytes, "bfloat16")
    assert sum(parts.values()) == pytest.approx(costs.op_s(kind, flops, nbytes, "bfloat16"))
    assert all(part >= 0 for part in parts.values())
    if waits_for is None:
        assert not any(parts.values())
    else:
        assert max(parts, key=lambda p: parts[p]) == waits_for
    assert (parts[COMPUTE] > 0 and parts[MEMORY] > 0) == (kind is OpClass.ATTENTION)


# -- why not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pin", [{"tp": 8}, {"mesh": [8], "up.weight": ("S(1)",)}, {"recompute": "full"}])
def test_why_not_says_what_planning_with_the_pin_finds(pin: dict[str, Any]) -> None:
    found = report().why_not(pin)
    asked = make("mlp", pin=pin)
    assert found.plan is not None and found.proven
    assert found.plan.objective_s == pytest.approx(asked.objective_s, rel=2 * SOLVER_GAP)
    assert found.extra_s == found.plan.objective_s - free("mlp").objective_s
    assert found.extra_bytes == found.plan.predicted["peak_bytes"] - free("mlp").predicted["peak_bytes"]
    assert changes_add_up(found)
    text = str(found)
    assert text.startswith("why not ") and "a step" in text and "peak memory" in text
    assert json.loads(json.dumps(found.to_dict()))["step_time_s"] == found.plan.objective_s


def test_why_not_replaces_a_pinned_mesh_and_keeps_other_pins() -> None:
    plan = make("mlp", pin={"dp": 8, "up": "recompute"})
    found = plan.explain().why_not({"tp": 8})
    assert found.plan is not None
    assert dict(found.plan.options.pin) == {"up": "recompute", "tp": 8}
    assert found.plan.layout()["tp"] == 8


def test_why_not_what_does_not_fit() -> None:
    plan = binding()
    limit = plan.options.memory_limit_bytes
    found = plan.explain().why_not({"dp": 8, "zero": 0})
    assert found.outcome == "does not fit" and found.plan is None
    assert found.needed_bytes is not None and found.needed_bytes > limit
    assert found.extra_s is None and found.to_dict()["step_time_s"] is None
    assert found.extra_bytes == found.needed_bytes - plan.predicted["peak_bytes"]
    assert "over the limit" in str(found)
    with pytest.raises(Infeasible):
        make("mlp", memory_limit_bytes=limit, pin={"dp": 8, "zero": 0})


@pytest.mark.parametrize(
    ("pin", "says"),
    [
        ({"tp": 3}, "do not make 8 devices"),
        ({"upp": ("R",)}, "up"),
        ({"pp": 2}, "only degree 1"),
        ({"mesh": [8], "down.bias": ("S(1)",)}, "cannot be stored as asked for on mesh 8; possible there: R; S(0)"),
    ],
)
def test_why_not_what_cannot_be(pin: dict[str, Any], says: str) -> None:
    found = report().why_not(pin)
    assert found.outcome == "impossible" and found.plan is None and found.extra_bytes is None
    assert says in str(found)


def test_a_bound_is_never_shown_as_a_value() -> None:
    """Without time, the answer is a plan that was found, with its gap said, and its figures are that plan's."""
    found = report().why_not({"tp": 8}, time_limit_s=0.0)
    assert found.plan is not None
    if not found.proven:
        assert "best found in the time" in found.verdict() and f"{found.plan.gap:.1%}" in found.verdict()
    assert found.to_dict()["step_time_s"] == found.plan.predicted["step_time_s"] >= found.plan.bound_s
    shaky = replace(found, plan=replace(found.plan, status="feasible", gap=0.25))
    assert "up to 25.0% less is not excluded" in shaky.verdict() and not shaky.proven


def test_nothing_asked() -> None:
    with pytest.raises(AutoparError, match="needs a pin"):
        report().why_not({})


# -- next best ---------------------------------------------------------------------------------


def test_next_best_storage_is_the_best_of_all_others() -> None:
    """The answer against brute force: every other placement of the parameter, pinned in turn."""
    plan = free("mlp")
    chosen = plan.decisions.params["up.weight"]
    (found,) = report().next_best("up.weight")
    assert found.plan is not None and found.plan.mesh == plan.mesh
    assert found.plan.decisions.params["up.weight"] != chosen
    states = [("R",), ("S(0)",), ("S(1)",)] if len(plan.mesh) == 1 else []
    others = []
    for state in states:
        if state != chosen:
            others.append(make("mlp", pin={"mesh": list(plan.mesh), "up.weight": state}).objective_s)
    assert others, "the plan is on a mesh of one axis"
    assert found.plan.objective_s == pytest.approx(min(others), rel=2 * SOLVER_GAP)
    assert changes_add_up(found) and found.extra_s is not None and found.extra_s >= -SOLVER_GAP * plan.objective_s


def test_next_best_mesh_is_the_best_of_all_others() -> None:
    plan = free("mlp")
    (found,) = report().next_best("mesh")
    others = [make("mlp", pin={"mesh": list(c.mesh)}).objective_s for c in plan.candidates if c.mesh != plan.mesh]
    assert found.plan is not None and found.plan.mesh != plan.mesh
    assert found.plan.objective_s == pytest.approx(min(others), rel=2 * SOLVER_GAP)
    assert found.instead == "x".join(map(str, found.plan.mesh))


def test_next_best_of_an_op_runs_it_otherwise() -> None:
    plan = free("mlp")
    slowest = next(d for d in report().decisions if d.kind == "op")
    (found,) = report().next_best(slowest.name)
    assert found.plan is not None
    for name in slowest.members:
        assert found.plan.decisions.nodes[name].rules != plan.decisions.nodes[name].rules
    assert found.extra_s is not None and found.extra_s >= -SOLVER_GAP * plan.objective_s
    assert found.chosen != found.instead


def test_next_best_of_activations() -> None:
    (found,) = report().next_best("activations of up")
    assert found.chosen == "all kept" and found.plan is not None
    assert any(d.recompute for d in found.plan.decisions.nodes.values())
    assert found.extra_s is not None and found.extra_s > 0
    again = make("mlp", pin={"recompute": "full", "mesh": [8]})
    assert again.explain().next_best("activations of up")[0].outcome == "pinned by you"
    assert again.explain().next_best("mesh")[0].outcome == "pinned by you"


def test_decisions_cover_the_plan() -> None:
    plan = free("mlp")
    kinds: dict[str, set[str]] = {}
    for decision in report().decisions:
        assert not kinds.setdefault(decision.kind, set()) & set(decision.members)
        kinds[decision.kind] |= set(decision.members)
    assert kinds["storage"] == set(plan.decisions.params)
    assert kinds["op"] == set(plan.decisions.nodes)
    with pytest.raises(AutoparError, match="has no decision 'nothing'; ask for one of: mesh, storage of"):
        report().next_best("nothing")


# -- the price of memory --------------------------------------------------------------------------


def test_memory_that_does_not_bind() -> None:
    price = report().memory_price
    assert price.binds is False and price.seconds_per_byte == 0.0
    assert "memory does not bind" in "\n".join(price.lines())
    assert len(price.tried) == 1


def test_the_price_of_a_byte_is_the_difference_of_two_plans() -> None:
    plan = binding()
    price = plan.explain().memory_price
    assert price.binds and price.free is not None and price.free.step_time_s is not None
    roomy = far().objective_s
    assert price.free.step_time_s == pytest.approx(roomy, rel=2 * SOLVER_GAP)
    assert price.less is not None and price.less.limit_bytes == int(price.limit_bytes * (1 - FIRST_STEP))
    assert "memory binds" in price.lines()[0]
    if price.more is None:
        assert price.seconds_per_byte is None and "buys nothing yet" in "\n".join(price.lines())
        return
    assert price.more.limit_bytes is not None and price.more.step_time_s is not None
    faster = far(memory_limit_bytes=price.more.limit_bytes).objective_s
    assert price.more.step_time_s == pytest.approx(faster, rel=2 * SOLVER_GAP)
    assert price.seconds_per_byte == pytest.approx(
        (plan.objective_s - price.more.step_time_s) / (price.more.limit_bytes - price.limit_bytes)
    )
    assert price.seconds_per_byte > 0 and faster < plan.objective_s * (1 - TOLERANCE / 2)


# -- the report ----------------------------------------------------------------------------------


def fits_a_screen(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) <= 42 and max(map(len, lines)) <= WIDTH


def test_the_text_fits_one_screen_and_says_what_the_dict_says() -> None:
    text, data = str(report()), report().to_dict()
    assert fits_a_screen(text), text
    json.dumps(data, allow_nan=False)
    for alternative in report().alternatives:
        assert short_title(alternative.decision)[:34] in text
    assert len(data["next_best"]) == len(report().alternatives) > 3
    assert {b["name"] for b in data["baselines"]} >= {"DDP", "FSDP"} and "FSDP" in text
    assert sum(data["resources_s"].values()) == pytest.approx(data["step_time_s"])
    assert "it waits for" in text and "memory does not bind" in text
    low, high = data["error_bars"]["step_time_s"]
    assert f"error bar: {seconds_text(low)} to {seconds_text(high)}, by 80% of " in text
    assert all(f"{f['what']} {f['share']:+.1%}" in text for f in data["faster"] if f["share"] < -0.001)


def test_a_report_keeps_to_its_time() -> None:
    hasty = free("mlp").explain(time_limit_s=0.0)
    assert hasty.alternatives == () and "more in report.decisions" in str(hasty)
    assert "was not solved in the time" in str(hasty)


def test_a_loaded_plan_needs_its_model_for_more() -> None:
    plan = Plan.loads(free("mlp").dumps())
    bare = plan.explain()
    text = str(bare)
    assert fits_a_screen(text) and "autopar explain FILE --again" in text and "it waits for" not in text
    assert bare.to_dict()["baselines"] is None
    for ask in (lambda: bare.why_not({"tp": 8}), lambda: bare.next_best("mesh"), lambda: bare.memory_price):
        with pytest.raises(AutoparError, match=r"plan\.explain\(model, example_inputs=\.\.\.\)"):
            ask()
    model, call = tiny_mlp()
    again = plan.explain(model, example_inputs=call)
    assert again.attribution.price.step_time_s == pytest.approx(plan.objective_s, rel=1e-9)
    assert again.plan.decisions == free("mlp").decisions
    found = again.why_not({"tp": 8})
    assert changes_add_up(found)
    assert found.extra_s == pytest.approx(report().why_not({"tp": 8}).extra_s, rel=1e-6)
    other, other_call = tiny_llama(layers=1)
    with pytest.raises(PlanMismatch):
        plan.explain(other, example_inputs=other_call)


def test_a_program_explains_like_its_plan() -> None:
    model, call = tiny_mlp()
    program = autopar.compile(model, ClusterSpec.preset("cpu", gpus=1), example_inputs=call)
    found = program.explain().why_not({"recompute": "full"})
    assert found.plan is not None and found.extra_s is not None and found.extra_s > 0
    assert "one device" in str(program.explain())


def test_infeasible_says_how_far_from_the_least_its_figure_may_be() -> None:
    with pytest.raises(Infeasible) as error:
        make("mlp", memory_limit_bytes=1000, time_limit_s=2, pin={"mesh": [8]})
    assert error.value.bound_bytes is not None and error.value.bound_bytes > 1000
    said = re.search(r"proven, by the planner's own account: within ([0-9.]+)% of the least", str(error.value))
    assert said is not None and float(said[1]) <= 1.0
