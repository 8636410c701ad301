"""Orders of passes, beside those of torch.distributed.pipelining."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from torch.distributed import pipelining

from autopar.errors import AutoparError, LayoutError
from autopar.simulating.schedules import Action, Order, check_orders, schedule_orders, warm_up

TORCH_KINDS = {
    "FORWARD": "forward",
    "FULL_BACKWARD": "backward",
    "BACKWARD_INPUT": "input gradients",
    "BACKWARD_WEIGHT": "weight gradients",
}


def torchs(name: str, stages: int, micro_batches: int, chunks: int) -> tuple[Order, ...]:
    """What a schedule of torch's runs on each rank, without its idle slots and reductions."""
    stage: Any = mock.create_autospec(pipelining.PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.num_stages, stage.submod = 0, stages, stages * chunks, None
    made: Any = getattr(pipelining, name)(
        stage if name in ("ScheduleGPipe", "Schedule1F1B") else [stage] * chunks, micro_batches
    )
    found = []
    for rank in range(stages):
        actions = [a for a in made.pipeline_order[rank] if a is not None and a.computation_type.name in TORCH_KINDS]
        kinds = [TORCH_KINDS[a.computation_type.name] for a in actions]
        order = zip(kinds, actions, strict=True)
        found.append(tuple(Action(kind, a.microbatch_index, a.stage_index // stages) for kind, a in order))
    return tuple(found)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 2), (4, 4), (4, 8), (8, 24), (3, 5), (4, 9)])
@pytest.mark.parametrize(("ours", "theirs"), [("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")])
def test_one_chunk(ours: str, theirs: str, stages: int, micro_batches: int) -> None:
    expected = list(torchs(theirs, stages, micro_batches, 1))
    if theirs == "Schedule1F1B":  # torch 2.13's picture of it counts the forward passes of the last stage from 1
        shifted = [a._replace(micro_batch=a.micro_batch - (a.kind == "forward")) for a in expected[-1]]
        expected[-1] = tuple(shifted)
    assert schedule_orders(ours, stages, micro_batches) == tuple(expected)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "chunks"), [(2, 2, 2), (2, 8, 3), (4, 4, 2), (4, 16, 3), (8, 8, 4)]
)
def test_interleaved(stages: int, micro_batches: int, chunks: int) -> None:
    found = schedule_orders("interleaved", stages, micro_batches, chunks)
    assert found == torchs("ScheduleInterleaved1F1B", stages, micro_batches, chunks)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 4), (4, 8), (8, 24)])
def test_zero_bubble(stages: int, micro_batches: int) -> None:
    found = schedule_orders("zero-bubble", stages, micro_batches)
    assert found == torchs("ScheduleInterleavedZeroBubble", stages, micro_batches, 1)


def test_fewer_micro_batches_than_stages() -> None:
    """torch's 1F1B would run micro-batches that do not exist; ours runs what there is."""
    for schedule in ("1f1b", "zero-bubble", "gpipe"):
        orders = schedule_orders(schedule, 6, 2)
        check_orders(orders, 2, 1)
        assert [warm_up(schedule, 6, 2, 1, at) for at in (0, 5)] == [2, 2 if schedule == "gpipe" else 0]


@pytest.mark.parametrize(
    ("schedule", "stages", "micro_batches", "chunks", "message"),
    [
        ("interleaved", 4, 6, 2, "multiple of pp=4"),
        ("1f1b", 4, 8, 2, "vpp=2"),
        ("interleaved", 4, 8, 1, "vpp=1"),
        ("dualpipe", 4, 8, 1, "unknown schedule=dualpipe"),
    ],
)
def test_what_cannot_be_run_is_refused(
    schedule: str, stages: int, micro_batches: int, chunks: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        schedule_orders(schedule, stages, micro_batches, chunks)


F, B, B1, B2 = (Action(kind, 0) for kind in TORCH_KINDS.values())


@pytest.mark.parametrize("order", [(F,), (B, F), (F, B2, B1), (F, B1), (F, B, B), (F, B, B1), ()])
def test_wrong_orders_are_refused(order: Order) -> None:
    with pytest.raises(AutoparError, match="the schedule of stage 1"):
        check_orders([(F, B), order], 1, 1)
    check_orders([(F, B), (F, B1, B2)], 1, 1)
