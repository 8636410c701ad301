"""Two plans side by side: what differs is named, what does not is not, and other models are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import autopar
from autopar import Plan, PlanMismatch
from autopar.plan_types import NodeDecision
from tests.models import tiny_llama
from tests.test_planning import cluster, free, make


def test_the_same_plan() -> None:
    plan = free("mlp")
    found = plan.diff(Plan.loads(plan.dumps()))
    assert found.same and str(found) == "the plans are the same"
    assert not any(found.to_dict().values())


def test_mesh_storage_and_figures() -> None:
    first, second = make("mlp", pin={"dp": 8, "zero": 0}), make("mlp", pin={"dp": 2, "tp": 4})
    found = first.diff(second)
    assert found.layout["mesh"] == ([8], [2, 4]) and found.layout["tp"] == (1, 4) and "pp" not in found.layout
    assert found.settings["pin dp"] == (8, 2) and "optimizer" not in found.settings
    assert found.figures["step_time_s"] == (first.predicted["step_time_s"], second.predicted["step_time_s"])
    changed = {c.parameters for c in found.storage}
    cut = {fqn for fqn, state in second.decisions.params.items() if set(state) != {"R"}}
    assert changed == cut and all(c.first == "whole" and "of 4" in c.second for c in found.storage)
    text = str(found)
    assert "mesh                   8 -> 2x4" in text and "up.weight" in text and "step time" in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["figures"]["peak_bytes"] == [first.predicted["peak_bytes"], second.predicted["peak_bytes"]]
    back = second.diff(first)
    assert back.layout["mesh"] == ([2, 4], [8])


def test_recomputed_ops_are_named_by_module_with_the_trace_and_by_kind_without() -> None:
    kept, again = make("mlp", pin={"dp": 8}), make("mlp", pin={"dp": 8, "recompute": "full"})
    only = kept.diff(again).recomputed
    assert not only[0] and sum(only[1].values()) == sum(d.recompute for d in again.decisions.nodes.values()) > 0
    assert "up" in only[1]
    bare = Plan.loads(kept.dumps()).diff(Plan.loads(again.dumps())).recomputed[1]
    assert sum(bare.values()) == sum(only[1].values()) and "up" not in bare
    assert "run again only in the second: " in str(kept.diff(again))


def test_layers_are_folded() -> None:
    model, call = tiny_llama(layers=2)
    plan = autopar.plan(model, cluster(2), example_inputs=call, pin={"dp": 2, "zero": 0}, time_limit_s=5)
    states = {f: ("S(0)",) if "q_proj" in f else s for f, s in plan.decisions.params.items()}
    nodes = {n: NodeDecision(d.rules, d.operand_states, d.result_states) for n, d in plan.decisions.nodes.items()}
    other = replace(plan, decisions=replace(plan.decisions, params=states, nodes=nodes))
    (change,) = plan.diff(other).storage
    assert (change.parameters, change.count) == ("model.layers.*.self_attn.q_proj.weight", 2)
    assert (change.first, change.second) == ("whole", "S(0) of 2")


def test_another_model_is_refused() -> None:
    model, call = tiny_llama(layers=1)
    other = autopar.plan(model, cluster(2), example_inputs=call, pin={"dp": 2, "zero": 0}, time_limit_s=5)
    with pytest.raises(PlanMismatch, match="different models, batches") as error:
        free("mlp").diff(other)
    assert "\n" not in str(error.value) and "input_ids [8, 16]" in str(error.value)
