"""Three models on four real processes, through the public face, against one device. One launch for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from autopar.verification import relative_error
from tests.launch import torchrun
from tests.models import tiny_bert
from tests.parity.gloo_ranks import CHECKPOINT_STEP, STEPS, adamw, loss_of, other_bert, parameter_error, plain_step

TOLERANCE = 1e-9
RANKS = 4


def test_four_processes_equal_one(tmp_path: Path) -> None:
    model, _ = other_bert()
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "plain", no_dist=True)
    ended = torchrun(Path(__file__).with_name("gloo_ranks.py"), RANKS, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-4000:]
    for rank in range(RANKS):
        check(json.loads((tmp_path / f"{rank}.json").read_text()), f"on rank {rank}")
    continue_on_one_device(tmp_path / "program")


@pytest.mark.parametrize("names", [("resnet",), pytest.param(("unet", "t5", "mixtral"), marks=pytest.mark.slow)])
def test_families_on_four_processes(names: tuple[str, ...], tmp_path: Path) -> None:
    ended = torchrun(Path(__file__).with_name("gloo_families.py"), RANKS, str(tmp_path), *names)
    assert ended.returncode == 0, ended.stderr[-4000:]
    for rank in range(RANKS):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert tuple(facts) == names
        for name, found in facts.items():
            for what in ("loss", "gradient", "parameter", "buffer"):
                assert found[what] <= TOLERANCE, f"{name} on rank {rank}: {what} is off by {found[what]:.1e}"
            assert found["buffers"] > 0 or name != "resnet", "running statistics are compared"
            assert found["cut"] > 0 or name == "resnet", f"{name}: no parameter is cut"


def check(facts: dict[str, dict[str, Any]], where: str) -> None:
    """Every number a rank reports is a relative difference (but "cut", a count), the rest must be true."""
    assert set(facts) == {"llama", "bert", "mlp"}
    for name, found in facts.items():
        assert found.pop("cut") > 0, f"{name} {where}: no parameter is cut"
        assert {"loss", "gradient", "norm", "parameter"} <= set(found)
        for what, value in found.items():
            if isinstance(value, bool):
                assert value, f"{name} {where}: not so: {what}"
            else:
                assert value <= TOLERANCE, f"{name} {where}: {what} is off by {value:.1e}"


def continue_on_one_device(checkpoint: Path) -> None:
    """A checkpoint of four ranks, with the optimizer, in one process: the last steps give the same parameters."""
    model, inputs = tiny_bert(layers=1)
    reference = adamw(model)
    for _ in range(CHECKPOINT_STEP):
        plain_step(model, reference, inputs)
    loaded, _ = tiny_bert(layers=1, seed=1)
    assert relative_error(loss_of(loaded(**inputs[1])), loss_of(model(**inputs[1]))) > 1e-3
    fresh = adamw(loaded)
    state = {"model": loaded.state_dict(), "optimizer": get_optimizer_state_dict(loaded, fresh)}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    loaded.load_state_dict(state["model"])
    set_optimizer_state_dict(loaded, fresh, state["optimizer"])
    assert relative_error(loss_of(loaded(**inputs[1])), loss_of(model(**inputs[1]))) <= TOLERANCE
    for _ in range(CHECKPOINT_STEP, STEPS):
        plain_step(model, reference, inputs)
        plain_step(loaded, fresh, inputs)
    assert parameter_error(loaded, model) <= TOLERANCE
