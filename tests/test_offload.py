"""Activations that wait on the host: chosen where it pays, priced, emitted, saved and read again, explained."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.codegen.memory import simulate_memory
from autopar.codegen.offload import is_on_host
from autopar.dataflow import module_path
from autopar.errors import ClusterSpecError, Infeasible, PinError, PlanError
from autopar.explaining.page.write import render
from autopar.segments import block_of
from autopar.trace import Trace, trace
from autopar.verification import emit_for

WIDTH, BLOCKS, BATCH = 64, 4, 2048


class Block(nn.Module):
    """Two products, as in an MLP; what the first makes is what waits."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@cache
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def cluster(link_bytes_per_s: float, gpus: int = 2) -> autopar.ClusterSpec:
    """Small devices (a product takes long) with a link to the host."""
    spec = autopar.ClusterSpec.preset("cpu", gpus=gpus)
    return replace(spec, device=replace(spec.device, host_link_bytes_per_s=link_bytes_per_s))


def planned(link_bytes_per_s: float, limit_bytes: int | None = None, gpus: int = 2, **options: Any) -> autopar.Plan:
    inputs = ((torch.zeros(BATCH, WIDTH),), {})
    return autopar.plan(
        model(), cluster(link_bytes_per_s, gpus), example_inputs=inputs, memory_limit_bytes=limit_bytes, **options
    )


@cache
def traced() -> Trace:
    return trace(model(), ((torch.zeros(BATCH, WIDTH),), {}))


@cache
def whole() -> autopar.Plan:
    """With all the memory in the world."""
    return planned(1e12)


def tight_bytes() -> int:
    figures = whole().predicted
    return int(figures["peak_bytes"] - 0.4 * figures["breakdown"]["memory_bytes"]["activations"])


@cache
def tight(link_bytes_per_s: float) -> autopar.Plan:
    return planned(link_bytes_per_s, tight_bytes())


def test_nothing_leaves_where_there_is_room() -> None:
    assert not whole().decisions.offloaded


def test_what_is_short_of_room_leaves_where_the_link_is_fast() -> None:
    slow, fast = tight(0.0), tight(1e12)
    assert not slow.decisions.offloaded and fast.decisions.offloaded
    assert whole().predicted["step_time_s"] <= fast.predicted["step_time_s"] < slow.predicted["step_time_s"]
    assert fast.predicted["peak_bytes"] <= tight_bytes()
    assert fast.predicted["breakdown"]["offload_s"] > 0 and fast.predicted["breakdown"]["host_bytes"] > 0


def test_a_faster_link_or_more_memory_never_makes_a_slower_plan() -> None:
    previous = float("inf")
    for link in (0.0, 1e9, 1e10, 1e12):
        now = tight(link).predicted["step_time_s"]
        assert now <= previous * (1 + 1e-4)
        previous = now
    more = planned(1e10, int(1.1 * tight_bytes())).predicted["step_time_s"]
    assert more <= tight(1e10).predicted["step_time_s"] * (1 + 1e-4)


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_program_computes_what_the_model_does(gpus: int) -> None:
    plan = planned(1e12, gpus=gpus, pin={"layers.1": "offload", "layers.2": "offload"})
    assert plan.decisions.offloaded
    assert not plan.decisions.kept & plan.decisions.offloaded
    report = autopar.verify(model(), plan)
    assert max(report.loss_error, report.worst_gradient_error) < 1e-5


def test_what_is_pinned_to_the_host_goes_there_and_nothing_else() -> None:
    plan = planned(1e12, pin={"layers.0": "keep", "layers.1": "offload", "layers.2": "recompute"})
    program = emit_for(traced(), plan)
    paths = {n.name: module_path(n) for n in traced().graph_module.graph.nodes}
    assert {block_of(paths[v]) for v in plan.decisions.offloaded} == {"layers.1"}
    copies = [n for n in program.forward.nodes if is_on_host(n)]
    back = [n for n in program.backward.nodes if n.target is torch.ops.autopar.fetch.default]
    assert len(copies) == len(back) == len(plan.decisions.offloaded)


def test_memory_between_the_passes_is_less_by_what_is_on_the_host() -> None:
    kept, away = planned(1e12, pin={"layers": "keep"}), planned(1e12, pin={"layers": "offload"})
    ends = []
    for plan in (kept, away):
        program = emit_for(traced(), plan)
        ends.append([p for p in simulate_memory(program, 0).points if p.phase == "forward"][-1].activations)
    on_host = away.predicted["breakdown"]["host_bytes"]
    assert on_host > 0
    assert ends[0] - ends[1] >= 0.5 * on_host


def test_the_plan_file_says_it_and_files_without_it_are_as_before(tmp_path: Path) -> None:
    plan = tight(1e12)
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["autopar_plan"] == 3 and data["offloaded"] == sorted(plan.decisions.offloaded)
    assert autopar.Plan.load(tmp_path / "plan.json").decisions == plan.decisions
    whole().save(tmp_path / "before.json")
    before = json.loads((tmp_path / "before.json").read_text())
    assert before["autopar_plan"] == 1 and "offloaded" not in before
    data["offloaded"] = ["no_such_value"]
    (tmp_path / "wrong.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="no_such_value"):
        autopar.verify(model(), autopar.Plan.load(tmp_path / "wrong.json"))


def test_the_report_says_what_waits_on_the_host() -> None:
    report = tight(1e12).explain(time_limit_s=2)
    text, data = str(report), report.to_dict()
    assert "wait for the backward pass on the host" in text and "to host and back" in text
    assert data["offloaded"] == sorted(tight(1e12).decisions.offloaded)
    gone = [name for name in data["time_line"]["names"] if name.endswith(" to the host")]
    assert gone == [f"{value} to the host" for value in data["offloaded"]]
    page = render(data)
    assert "wait for the backward pass on the host" in page and data["offloaded"][0] in page


def test_a_cluster_without_a_link_offloads_nothing() -> None:
    with pytest.raises(PinError, match="host_link_bytes_per_s"):
        planned(0.0, pin={"layers.1": "offload"})
    with pytest.raises(ClusterSpecError, match="host_link_bytes_per_s"):
        cluster(-1.0)


def test_the_hosts_memory_is_a_limit() -> None:
    small = cluster(1e12)
    small = replace(small, host_memory_bytes=2)
    inputs = ((torch.zeros(BATCH, WIDTH),), {})
    with pytest.raises(Infeasible):
        autopar.plan(model(), small, example_inputs=inputs, pin={"layers.1": "offload"})
    plan = autopar.plan(model(), small, example_inputs=inputs, memory_limit_bytes=tight_bytes())
    assert not plan.decisions.offloaded


def test_old_cluster_files_know_no_link() -> None:
    data = autopar.ClusterSpec.preset("h100-sxm").to_dict()
    assert data["device"].pop("host_link_bytes_per_s") > 1e10
    data["schema_version"] = 3
    assert autopar.ClusterSpec.from_dict(data).device.host_link_bytes_per_s == 0.0
