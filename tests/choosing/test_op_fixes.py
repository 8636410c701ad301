"""Fixes that are named where no plan op by op fits: each, applied through the face, fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.choosing import op_fixes
from autopar.errors import Infeasible

BATCH, WIDTH = 8, 32
CLUSTER = autopar.ClusterSpec.preset("h100-sxm", gpus=2)


class Net(nn.Module):
    """Layers in a row, alike, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


@pytest.fixture(autouse=True)
def enough_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is busy with something else, too."""
    monkeypatch.setattr(op_fixes, "DEFAULT_TIME_S", 60.0)


def planned(change: dict[str, Any], limit: int, **pin: Any) -> autopar.Plan:
    cluster, batch = CLUSTER, change.get("global_batch", BATCH)
    if "cluster" in change:
        cluster = autopar.ClusterSpec.preset(change["cluster"], gpus=cluster.devices)
    cluster = replace(cluster, nodes=change.get("nodes", cluster.nodes))
    pins = {**pin, **{k: v for k, v in change.items() if k == "offload"}}
    limit = change.get("memory_limit_bytes", limit)
    call = ((torch.zeros(batch, WIDTH, device="meta"),), {})
    return autopar.plan(Net(), cluster, example_inputs=call, pin=pins, memory_limit_bytes=limit)


def refused(limit: int, **pin: Any) -> Infeasible:
    with pytest.raises(Infeasible) as caught:
        planned({}, limit, **pin)
    return caught.value


def test_each_fix_fits() -> None:
    needed = refused(1).needed_bytes
    assert needed is not None
    error = refused(needed - 1)
    kinds = {key for fix in error.fixes for key in fix.change}
    assert {"memory_limit_bytes", "global_batch"} <= kinds
    for fix in error.fixes:
        made = planned(dict(fix.change), needed - 1)
        assert made.predicted["peak_bytes"] == fix.peak_bytes <= fix.change.get("memory_limit_bytes", needed - 1), fix
        assert made.predicted["step_time_s"] == pytest.approx(fix.step_time_s)
    assert "; any one of: " in str(error) and "\n" not in str(error)
    assert str(error).startswith("no plan fits ")


def test_without_time_the_limit_is_named_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_fixes, "DEFAULT_TIME_S", 0.0)
    monkeypatch.setattr(op_fixes, "MOST_TIMES", 0)
    error = refused(1)
    assert error.fixes == () and "raise the limit to that" in str(error)


def test_a_smaller_batch_is_the_largest_half_that_fits() -> None:
    pin = {"dp": 2, "zero": 0}
    limit = (refused(1, **pin).needed_bytes or 0) - 1
    fix = next(f for f in refused(limit, **pin).fixes if "global_batch" in f.change)
    assert fix.change == {"global_batch": BATCH // 2}
