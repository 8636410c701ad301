"""Models, clusters and worlds that cannot work: one clear error each, before anything is allocated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.errors import ClusterSpecError, PlanMismatch, RuntimeFailure
from autopar.runtime import memory
from tests.models import tiny_mlp

GIB = 2**30
ONE = autopar.ClusterSpec.preset("cpu", gpus=1)


class Model(nn.Module):
    """A layer, and a parameter that nothing trains."""

    def __init__(self, body: Callable[[nn.Module, torch.Tensor], Any], extra: torch.Tensor | None = None) -> None:
        super().__init__()
        self.layer, self.body = nn.Linear(4, 4), body
        if extra is not None:
            self.extra = nn.Parameter(extra, requires_grad=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.body(self, x)


X = ((torch.ones(8, 4),), {})


# -- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [lambda m, x: m.layer(x), lambda m, x: {"a": m.layer(x), "b": m.layer(x).sum(1)}])
def test_train_step_needs_a_loss(body: Callable[..., Any]) -> None:
    program = autopar.compile(Model(body), ONE, example_inputs=X)
    with pytest.raises(RuntimeFailure, match="train_step needs a model that returns its loss; compute the loss of"):
        program.train_step(*X[0])


@pytest.mark.parametrize(
    "extra", [torch.arange(4), torch.tensor([True, False, True, True]), torch.ones(4, dtype=torch.complex64)]
)
def test_parameters_without_gradient_may_be_of_any_dtype(extra: torch.Tensor) -> None:
    """Integers, flags and complex numbers are used as they are; the rest trains."""

    def body(module: Any, x: torch.Tensor) -> torch.Tensor:
        factor = module.extra.real if module.extra.is_complex() else module.extra
        return (module.layer(x) * factor).sum()

    model = Model(body, extra)
    program = autopar.compile(model, ONE, example_inputs=X)
    program.train_step(*X[0])
    model(*X[0]).backward()
    grads = {name: p.grad for name, p in program.named_parameters()}
    assert grads["extra"] is None
    torch.testing.assert_close(grads["layer.weight"], model.layer.weight.grad)


def test_a_part_of_size_zero_inside_the_model() -> None:
    """Only inputs and parameters must hold something; what lies between may be empty."""

    def body(module: Any, x: torch.Tensor) -> torch.Tensor:
        out = module.layer(x)
        return out.sum() + out[:, 4:].sum()

    model = Model(body)
    program = autopar.compile(model, ONE, example_inputs=X)
    assert float(program.train_step(*X[0])) == pytest.approx(model(*X[0]).item())


# -- memory ---------------------------------------------------------------------------------------


def test_a_model_larger_than_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned on meta without a byte of it; refused by compile before a byte of it is made."""
    with torch.device("meta"):
        layer = nn.Linear(2**20, 2**18)  # 1 TiB
    model = nn.Sequential(layer, nn.Flatten(0))
    call = ((torch.empty(2, 2**20, device="meta"),), {})
    roomy = replace(ONE, device=replace(ONE.device, memory_bytes=2**46))
    plan = autopar.plan(model, roomy, example_inputs=call)
    assert plan.predicted["peak_bytes"] > 3 * 2**40
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: 64 * GIB)
    with pytest.raises(
        RuntimeFailure, match=r"holds 307\d GiB of parameters, .* on each of 1 ranks here, this host has 64"
    ):
        autopar.compile(model, roomy, plan=plan, example_inputs=call)


def test_all_ranks_of_a_host_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_memory_bytes", lambda: 4 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    memory.check_room(GIB, 4, "cpu")
    with pytest.raises(RuntimeFailure, match="on each of 4 ranks here, this host has 4 GiB; use more devices"):
        memory.check_room(GIB + 1, 4, "cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (GIB, 2 * GIB))
    memory.check_room(2 * GIB, 4, "cuda")
    with pytest.raises(RuntimeFailure, match="of 1 ranks here, the GPU has 2 GiB"):
        memory.check_room(3 * GIB, 4, "cuda")


# -- worlds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 3, 5, 7])
def test_device_counts_that_divide_nothing(devices: int) -> None:
    """Where no dim divides, everything is whole on every rank; the program is the model all the same."""
    model, call = tiny_mlp()
    plan = autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=devices), example_inputs=call)
    assert plan.mesh == ((devices,) if devices > 1 else ())
    assert all(state == ("R",) * len(plan.mesh) for state in plan.decisions.params.values())
    report = autopar.verify(model, plan, example_inputs=call)
    assert report.ranks == devices


def test_a_prime_count_is_used_where_it_divides() -> None:
    """A batch of 21 on 7 devices and on 3: cut, as the pins ask for, and verified."""
    model = Model(lambda m, x: m.layer(x).square().mean()).double()
    call = ((torch.randn(21, 4, dtype=torch.float64),), {})
    for devices in (3, 7):
        cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=devices)
        plan = autopar.plan(model, cluster, example_inputs=call, pin={"dp": devices})
        assert plan.layout()["dp"] == devices
        assert autopar.verify(model, plan, example_inputs=call).ranks == devices


def test_a_plan_for_another_number_of_devices() -> None:
    model, call = tiny_mlp()
    plan = autopar.plan(model, ONE, example_inputs=call)
    for devices in (2, 3):
        with pytest.raises(PlanMismatch, match=rf"the plan is for 1 devices, the cluster has {devices}; plan again"):
            autopar.compile(model, autopar.ClusterSpec.preset("cpu", gpus=devices), plan=plan)


# -- clusters -----------------------------------------------------------------------------------------


def leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all numbers in nested data."""
    if isinstance(data, (dict, list)):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        return [leaf for key, value in items for leaf in leaves(value, (*path, key))]
    return [path] if isinstance(data, (int, float)) and not isinstance(data, bool) else []


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, -1, "1", True, None, [1], {"a": 1}, 10**400])
def test_every_number_of_a_cluster_file(wrong: Any) -> None:
    """Each number in turn is made impossible: one line that names it."""
    text = autopar.ClusterSpec.preset("h100-sxm", gpus=16).to_json()
    for path in leaves(json.loads(text)):
        if wrong is None and path[-1] == "price_per_hour_usd":
            continue  # may be unknown
        data = json.loads(text)
        at = data
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = wrong
        with pytest.raises(ClusterSpecError) as caught:
            autopar.ClusterSpec.from_json(json.dumps(data))
        message = str(caught.value)
        assert str(path[-1]) in message and "\n" not in message and len(message) < 400
