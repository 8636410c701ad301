"""Layouts with expert ranks inside of pipeline stages: what they run, against the single device, through the face."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import autopar
import autopar.api
from autopar.errors import PinError
from autopar.pins import parse_pins
from autopar.plans import Plan
from autopar.staged import StagedPlan
from autopar.trace import trace
from tests.widen import widened

SEQ, BATCH = 8, 8
_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_experts_per_tok": 2, "use_cache": False,
}  # fmt: skip
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "head_dim": 8, "moe_intermediate_size": 16, "norm_topk_prob": True}),
    "deepseek": (
        "DeepseekV3",
        {
            "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16,
            "first_k_dense_replace": 0, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8,
            "qk_nope_head_dim": 4,
        },
    ),
}  # fmt: skip
_FAMILIES["dense first"] = (  # layers that are not all alike: as in DeepSeek-V3, whose first three have no experts
    "DeepseekV3", {**_FAMILIES["deepseek"][1], "num_hidden_layers": 6, "first_k_dense_replace": 1},
)  # fmt: skip


@cache
def model(family: str) -> torch.nn.Module:
    import transformers

    name, more = _FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**_SIZES, **more})
    torch.manual_seed(0)
    made: torch.nn.Module = getattr(transformers, f"{name}ForCausalLM")._from_config(config, dtype=torch.float64)
    return made.double().train()


def plan_of(family: str, devices: int, pin: dict[str, Any]) -> StagedPlan:
    cluster = autopar.ClusterSpec.preset("cpu", gpus=devices)
    found = autopar.plan(model(family), cluster, seq=SEQ, global_batch=BATCH, pin=pin)
    assert isinstance(found, StagedPlan)
    read = Plan.loads(found.dumps())
    assert isinstance(read, StagedPlan) and read.mesh == found.mesh
    return read


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autopar.api, "trace", lambda model, call: widened(trace(model, call)))


CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("mixtral", 4, {"pp": 2, "dp": 2, "ep": 2, "micro_batch": 2, "schedule": "1f1b"}),
    ("mixtral", 8, {"pp": 2, "dp": 4, "ep": 4, "zero": 1, "micro_batch": 1, "schedule": "zero-bubble"}),
    ("mixtral", 8, {"pp": 2, "dp": 4, "ep": 2, "zero": 3, "micro_batch": 1, "recompute": "full"}),
    ("qwen3_moe", 8, {"pp": 2, "dp": 2, "ep": 2, "tp": 2, "micro_batch": 2, "sp": True}),
    ("deepseek", 4, {"pp": 2, "dp": 2, "ep": 2, "micro_batch": 2, "vpp": 2}),
    ("deepseek", 8, {"pp": 2, "dp": 4, "ep": 2, "zero": 1, "micro_batch": 1}),
    ("dense first", 4, {"pp": 2, "dp": 2, "ep": 2, "micro_batch": 2}),
]


@pytest.mark.parametrize(
    ("family", "devices", "pin"),
    [pytest.param(*case, marks=() if at == 0 else pytest.mark.slow) for at, case in enumerate(CASES)],
    ids=lambda value: str(value),
)
def test_equal_to_one_device(family: str, devices: int, pin: dict[str, Any]) -> None:
    """The whole schedule, in float64; experts are stored where they run, and rows are exchanged."""
    plan = plan_of(family, devices, pin)
    assert (plan.named.ep, plan.roles) == (pin["ep"], ("dp", "cp", "ep", "tp"))
    assert all(plan.decisions.params[fqn][2] == "S(0)" for fqn in plan.decisions.params if ".experts." in fqn)
    assert_as_on_one_device(family, devices, plan)


def assert_as_on_one_device(family: str, devices: int, plan: Plan) -> None:
    """Experts' loss and gradients, to nine digits."""
    report = autopar.verify(model(family), plan)
    assert report.ranks == devices
    assert max(report.loss_error, report.worst_gradient_error) <= 1e-9


@pytest.mark.parametrize(
    ("pin", "devices", "mesh"),
    [
        ({"dp": 4, "ep": 2}, 4, (2, 2)),  # as in a layout: two of the four
        ({"dp": 4, "ep": 4}, 4, (4,)),
        ({"dp": 4, "tp": 2, "ep": 2}, 8, (2, 2, 2)),
        ({"dp": 2, "ep": 2}, 4, (2, 2)),  # an axis each
        ({"ep": 2, "tp": 2}, 8, (2, 2, 2)),
    ],
)
def test_expert_ranks_may_be_some_of_the_data_ranks(pin: dict[str, Any], devices: int, mesh: tuple[int, ...]) -> None:
    assert parse_pins(pin, devices).mesh == mesh


def test_degrees_that_do_not_fit() -> None:
    with pytest.raises(PinError, match="do not make 4 devices"):
        parse_pins({"dp": 4, "ep": 3}, 4)
