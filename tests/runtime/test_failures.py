"""What goes wrong at run time ends in one clear error, on every rank, and never hangs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import autopar
from autopar.errors import PinError, PlanMismatch, RuntimeFailure
from autopar.runtime.world import join_world
from tests.launch import Ended, ranks
from tests.models import tiny_mlp

SCRIPT = Path(__file__).with_name("failing_ranks.py")
LIMIT_S = 30  # from the death of a rank to the end of the others
OUR_ERROR = 3  # exit code of failing_ranks.py


@pytest.fixture(autouse=True)
def outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- one process ---------------------------------------------------------------------------


def test_called_without_torchrun() -> None:
    model, _ = tiny_mlp()
    with pytest.raises(RuntimeFailure, match=r"not started by torchrun; start it with: torchrun --nproc-per-node 4"):
        autopar.compile(model, autopar.ClusterSpec.preset("cpu", gpus=4))


def test_local_cluster_without_torchrun() -> None:
    with pytest.raises(RuntimeFailure, match="WORLD_SIZE is not set"):
        autopar.ClusterSpec.local()


def test_plan_for_another_number_of_devices() -> None:
    model, call = tiny_mlp()
    plan = autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=4), example_inputs=call)
    with pytest.raises(PlanMismatch, match="the plan is for 4 devices, the cluster has 2; plan again"):
        autopar.compile(model, autopar.ClusterSpec.preset("cpu", gpus=2), plan=plan)


def test_world_of_another_size() -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        with pytest.raises(PlanMismatch, match=r"the plan is for 4 ranks, but 1 are running; .*4 processes"):
            join_world(4, "cpu")
    finally:
        dist.destroy_process_group()


def test_batch_of_another_shape_than_the_plan() -> None:
    model, (args, kwargs) = tiny_mlp()
    one = autopar.ClusterSpec.preset("cpu", gpus=1)
    plan = autopar.plan(model, one, example_inputs=(args, kwargs))
    program = autopar.compile(model, one, plan=plan)
    with pytest.raises(PlanMismatch, match=r"\(8, 64\).*this batch is.*\(4, 64\).*plan again for this batch"):
        program(args[0][:4], **{**kwargs, "target": kwargs["target"][:4]})
    program(*args, **kwargs)["loss"].backward()  # still fit for the batch that it was made for


def test_pinned_data_parallel_degree_that_does_not_divide_the_batch() -> None:
    model, (args, kwargs) = tiny_mlp()
    call = ((args[0][:6],), {**kwargs, "target": kwargs["target"][:6]})
    with pytest.raises(PinError, match="the global batch of 6 does not divide by dp=4; change the batch or the pin"):
        autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=4), example_inputs=call, pin={"dp": 4})


# -- several -------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", [2, 0], ids=["a rank", "the rank with the store"])
def test_a_rank_that_dies_is_named(victim: int, tmp_path: Path) -> None:
    ended = ranks(SCRIPT, 4, "dies", str(victim), out=tmp_path)
    assert ended[victim].returncode == -9, texts(ended)
    for rank, other in enumerate(ended):
        if rank != victim:
            assert other.returncode == OUR_ERROR, texts(ended)
            assert other.stdout.startswith(f"RuntimeFailure: rank {victim} died"), texts(ended)
            assert other.seconds - ended[victim].seconds < LIMIT_S


@pytest.mark.parametrize(
    ("scenario", "count", "victim"),
    [("stage", 3, 1), ("stage", 3, 2), pytest.param("program stage", 2, 1, marks=pytest.mark.slow)],
)
def test_a_stage_that_dies_is_named(scenario: str, count: int, victim: int, tmp_path: Path) -> None:
    ended = ranks(SCRIPT, count, scenario, str(victim), out=tmp_path)
    assert ended[victim].returncode == -9, texts(ended)
    for rank, other in enumerate(ended):
        if rank != victim:
            assert other.returncode == OUR_ERROR, texts(ended)
            assert other.stdout.startswith(f"RuntimeFailure: rank {victim} died"), texts(ended)
            assert "Schedule" not in other.stderr, texts(ended)
            assert other.seconds - ended[victim].seconds < LIMIT_S


def test_an_error_of_planning_reaches_all_ranks(tmp_path: Path) -> None:
    ended = ranks(SCRIPT, 2, "planning", out=tmp_path)
    for rank in ended:
        assert rank.stdout.startswith("Infeasible: no plan fits"), texts(ended)
    assert ended[0].returncode == 1 and "KeyError: 'a bug'" in ended[0].stderr, texts(ended)
    assert ended[1].returncode == OUR_ERROR, texts(ended)
    assert "RuntimeFailure: rank 0 failed: KeyError('a bug')" in ended[1].stdout, texts(ended)


def texts(ended: list[Ended]) -> str:
    """What all ranks said, for the message of a failed test."""
    return "\n".join(f"--- rank {r}: {e.returncode}\n{e.stdout}\n{e.stderr[-1500:]}" for r, e in enumerate(ended))
