"""Idle time of the steps that a program executes: torch's lowering of our orders, timed without a clock."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from autopar._torch_compat import simulated_mesh
from autopar.errors import AutoparError
from autopar.runtime.rank_pipeline import Place, RankPipeline
from autopar.simulating.replay import MESSAGES, SEND_FORWARD, Step, replay
from autopar.simulating.schedules import BACKWARD, FORWARD, INPUTS, WEIGHTS, schedule_orders
from tests.runtime.chain import chain

STAGES = 4  # pipeline ranks
SECONDS = {FORWARD: 1.0, INPUTS: 1.0, WEIGHTS: 1.0, BACKWARD: 2.0}


def executed(schedule: str, micro_batches: int, chunks: int = 1) -> tuple[tuple[Step, ...], ...]:
    """What every rank of a real pipeline program executes in a step."""
    program, orders = chain(STAGES * chunks), schedule_orders(schedule, STAGES, micro_batches, chunks)
    with simulated_mesh((STAGES,)):
        place = Place(dist.group.WORLD, (), (), torch.device("cpu"))  # type: ignore[arg-type]
        return RankPipeline(program, orders, {name: name for name in program.owners}, place).schedule.steps


def theory(schedule: str, m: int, v: int) -> float:
    """Idle share of p even stages.

    gpipe, 1f1b: (p - 1) / (m + p - 1), Huang et al. 2019 (section 2.3), Narayanan et al. 2019. interleaved:
    (p - 1) / (v m + p - 1), Narayanan et al. 2021, section 2.2.2. zero-bubble: a bubble of (p - 1) (forward + input
    gradients - weight gradients), Qi et al. 2023, table 2, ZB-H1.
    """
    p = STAGES
    if schedule != "zero-bubble":
        return (p - 1) / (v * m + p - 1)
    bubble = (p - 1) * (SECONDS[FORWARD] + SECONDS[INPUTS] - SECONDS[WEIGHTS])
    return bubble / (m * (SECONDS[FORWARD] + SECONDS[INPUTS] + SECONDS[WEIGHTS]) + bubble)


@pytest.mark.parametrize("m", [4, 8, 16, 32])
@pytest.mark.parametrize(("schedule", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)])
def test_bubbles_are_those_of_theory(schedule: str, v: int, m: int) -> None:
    found = replay(executed(schedule, m, v), lambda step: SECONDS[step.kind] / v)
    assert found.idle_share == pytest.approx([theory(schedule, m, v)] * STAGES, rel=0.02)


def test_schedules_differ_as_theory_says() -> None:
    """The order of their idle shares, for as many micro-batches: what a better schedule is for."""
    chunks = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero-bubble": 1}
    ends = {s: replay(executed(s, 8, v), lambda step, v=v: SECONDS[step.kind] / v).end_s for s, v in chunks.items()}
    assert ends["zero-bubble"] < ends["interleaved"] < ends["1f1b"] == ends["gpipe"]


def test_a_slow_message_is_waited_for() -> None:
    """Three of them on the way there and three back, before the first rank can end its first micro-batch."""
    steps = executed("1f1b", 4)
    late, early = (replay(steps, lambda step: SECONDS[step.kind], send_s) for send_s in (0.25, 0.0))
    assert late.end_s >= early.end_s + 6 * 0.25


def test_ranks_that_wait_for_each_other_are_told() -> None:
    steps = [[s for s in rank if not (s.kind == SEND_FORWARD and s.micro_batch == 2)] for rank in executed("1f1b", 4)]
    assert all(any(s.kind in MESSAGES for s in rank) for rank in steps)
    with pytest.raises(AutoparError, match=r"rank 0 waits for ever before .*backward"):
        replay(steps, lambda step: SECONDS[step.kind])
