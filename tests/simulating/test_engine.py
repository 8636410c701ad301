"""The simulator against theory, and what must hold for every schedule."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import AutoparError
from autopar.layouts import Layout
from autopar.predicting.memory import in_flight
from autopar.simulating.costs import COMPUTE, DATA, PIPELINE, ChunkCost, PassCost, Piece, Reduction, StageCost, StepCost
from autopar.simulating.engine import Task, run_step
from autopar.simulating.schedules import BACKWARD, FORWARD, INPUTS, WEIGHTS, Action, schedule_orders
from autopar.simulating.simulation import Simulation, simulate_cost
from autopar.simulating.timeline import in_flight_peak
from tests.simulating.jobs import Seconds, step

EVEN: Seconds = (1.0, 1.1, 0.9)
SHAPES = [(2, 2), (2, 8), (4, 4), (4, 16), (8, 8), (8, 64)]


@pytest.mark.parametrize(("p", "m"), SHAPES)
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_idle_share_of_plain_schedules(schedule: str, p: int, m: int) -> None:
    """(p - 1) / (m + p - 1): Huang et al. 2019, Narayanan et al. 2019."""
    found = simulate_cost(step(schedule, [EVEN] * p, m))
    assert found.step_time_s == pytest.approx((m + p - 1) * sum(EVEN))
    assert found.idle_share == pytest.approx([(p - 1) / (m + p - 1)] * p)


@pytest.mark.parametrize(("p", "m"), SHAPES)
@pytest.mark.parametrize("v", [2, 3])
def test_idle_share_of_interleaved_stages(p: int, m: int, v: int) -> None:
    """The bubble is (p - 1) / v of a micro-batch: Narayanan et al. 2021, section 2.2.2."""
    found = simulate_cost(step("interleaved", [EVEN] * p, m, v))
    bubble = (p - 1) / v
    assert found.step_time_s == pytest.approx((m + bubble) * sum(EVEN))
    assert found.idle_share == pytest.approx([bubble / (m + bubble)] * p)


@pytest.mark.parametrize(("p", "m"), SHAPES)
def test_idle_share_of_zero_bubble(p: int, m: int) -> None:
    """The bubble is (p - 1) (forward + input gradients - weight gradients): Qi et al. 2023, table 2, ZB-H1."""
    forward, inputs, weights = 1.0, 1.0, 1.0
    found = simulate_cost(step("zero-bubble", [(forward, inputs, weights)] * p, m))
    bubble, work = (p - 1) * (forward + inputs - weights), m * (forward + inputs + weights)
    assert found.step_time_s == pytest.approx(work + bubble)
    assert found.idle_share == pytest.approx([bubble / (work + bubble)] * p)


def test_uneven_stages_where_the_closed_form_is_exact() -> None:
    """The slowest stage's work and one micro-batch through the others: any gpipe, 1f1b if the last is the slowest."""
    scales = [1.0, 0.7, 1.3, 0.9, 1.6]
    stages = [(s, 1.1 * s, 0.9 * s) for s in scales]
    expected = 12 * sum(stages[-1]) + sum(map(sum, stages[:-1]))
    for schedule in ("1f1b", "gpipe"):
        assert simulate_cost(step(schedule, stages, 12)).step_time_s == pytest.approx(expected)
    slow_first = stages[::-1]
    assert simulate_cost(step("gpipe", slow_first, 12)).step_time_s == pytest.approx(expected)
    assert simulate_cost(step("1f1b", slow_first, 12)).step_time_s < 0.99 * expected  # its warm-up fills the gap


def exposed_sends(schedule: str, p: int, m: int, v: int = 1) -> float:
    """By how many sends a step is longer than without any."""
    send_s = 0.01
    there = simulate_cost(step(schedule, [EVEN] * p, m, v, send_s=send_s)).step_time_s
    return (there - simulate_cost(step(schedule, [EVEN] * p, m, v)).step_time_s) / send_s


def test_an_interleaved_pipeline_hides_its_sends_and_a_plain_one_does_not() -> None:
    """A stage of 1f1b has p micro-batches on their way at most: in the time of p it waits for 2 (p - 1) sends.
    Interleaved stages have twice as many on their way, and wait while the pipeline fills and empties only.
    """
    p, v = 4, 2
    assert exposed_sends("1f1b", p, 64) - exposed_sends("1f1b", p, 32) == pytest.approx(32 * 2 * (p - 1) / p)
    assert exposed_sends("interleaved", p, 64, v) == pytest.approx(2 * (p * v - 1))
    assert exposed_sends("gpipe", p, 64) == pytest.approx(2 * (p - 1))


# -- what holds for all of them -----------------------------------------------------------


@st.composite
def steps(draw: st.DrawFn) -> StepCost:
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero-bubble"]))
    p = draw(st.integers(2, 7))
    chunks = draw(st.integers(2, 4)) if schedule == "interleaved" else 1
    m = p * draw(st.integers(1, 4)) if chunks > 1 else draw(st.integers(1, 20))
    seconds = st.floats(0.1, 3.0)
    stages = [draw(st.tuples(seconds, seconds, seconds)) for _ in range(p)]
    small = st.sampled_from([0.0, 0.01, 0.4])
    return step(schedule, stages, m, chunks, send_s=draw(small), message_s=draw(small), host_s=draw(small) * 5)


def lanes(tasks: tuple[Task, ...]) -> dict[tuple[int, str], list[Task]]:
    found: dict[tuple[int, str], list[Task]] = defaultdict(list)
    for task in tasks:
        found[task.stage, task.lane].append(task)
    return found


@settings(deadline=None, max_examples=60)
@given(steps())
def test_every_schedule_runs_every_pass_once_and_in_order(cost: StepCost) -> None:
    p, chunks = len(cost.stages), len(cost.stages[0].chunks)
    stages = run_step(cost)
    ends = {(s.at, r.action): r.end_s for s in stages for r in s.passes}
    starts = {(s.at, r.action): r.start_s for s in stages for r in s.passes}
    back = INPUTS if cost.schedule == "zero-bubble" else BACKWARD
    kinds = [FORWARD, INPUTS, WEIGHTS] if cost.schedule == "zero-bubble" else [FORWARD, BACKWARD]
    expected = {
        (at, Action(kind, k, c)) for at in range(p) for c in range(chunks) for k in range(cost.micro_batches)
        for kind in kinds
    }  # fmt: skip
    assert set(ends) == expected and sum(len(s.passes) for s in stages) == len(expected)
    for k in range(cost.micro_batches):
        way = [(at, c) for c in range(chunks) for at in range(p)]
        for (at, c), (after, d) in pairwise(way):
            there, again = (after, Action(FORWARD, k, d)), (at, Action(back, k, c))
            assert starts[there] >= ends[at, Action(FORWARD, k, c)] + cost.send_s - 1e-9
            assert starts[again] >= ends[after, Action(back, k, d)] + cost.send_s - 1e-9
        last = (way[-1][0], Action(back, k, way[-1][1]))
        assert starts[last] >= ends[last[0], Action(FORWARD, k, way[-1][1])]


@settings(deadline=None, max_examples=60)
@given(steps())
def test_tasks_of_a_lane_do_not_overlap_and_nothing_is_lost(cost: StepCost) -> None:
    found = simulate_cost(cost)
    for tasks in lanes(found.tasks).values():
        assert all(a.end_s <= b.start_s for a, b in pairwise(tasks))
    chunks = len(cost.stages[0].chunks)
    sends = 2 * cost.micro_batches * (len(cost.stages) * chunks - 1) if cost.send_s else 0
    assert sum(t.lane == PIPELINE for t in found.tasks) == sends
    for at, stage in enumerate(cost.stages):
        passes = stage.chunks[0].passes
        one = sum(passes[k].pieces[0].compute_s for k in (FORWARD, BACKWARD)) * chunks
        busy = sum(t.end_s - t.start_s for t in found.tasks if t.stage == at and t.lane == COMPUTE)
        assert busy == pytest.approx(cost.micro_batches * one)
        assert found.idle_share[at] == pytest.approx(1 - busy / found.step_time_s)


@settings(deadline=None, max_examples=60)
@given(steps())
def test_micro_batches_in_flight_are_those_that_memory_is_priced_for(cost: StepCost) -> None:
    p, v = len(cost.stages), len(cost.stages[0].chunks)
    layout = Layout(pp=p, vpp=v, schedule=cost.schedule)
    found = simulate_cost(cost)
    for at, passes in enumerate(found.passes):
        priced = in_flight(layout, cost.micro_batches, at)
        assert in_flight_peak(passes, v) == pytest.approx(priced)
        assert found.memory[at].peak.activations == pytest.approx(priced * v)  # a byte a chunk
        assert found.memory[at].points[-1].activations == 0


def faster(cost: StepCost, share: float) -> StepCost:
    """All messages take a share of the time."""

    def quick(one: PassCost) -> PassCost:
        pieces = [dataclasses.replace(x, messages=tuple((n, s * share) for n, s in x.messages)) for x in one.pieces]
        return PassCost(tuple(pieces), one.host_s)

    def chunk(one: ChunkCost) -> ChunkCost:
        return ChunkCost({kind: quick(passed) for kind, passed in one.passes.items()}, one.kept_bytes)

    stages = tuple(dataclasses.replace(s, chunks=tuple(map(chunk, s.chunks))) for s in cost.stages)
    return dataclasses.replace(cost, stages=stages, send_s=cost.send_s * share)


@settings(deadline=None, max_examples=60)
@given(steps(), st.floats(0.0, 1.0))
def test_more_bandwidth_never_gives_a_longer_step(cost: StepCost, share: float) -> None:
    assert simulate_cost(faster(cost, share)).step_time_s <= simulate_cost(cost).step_time_s * (1 + 1e-12)


# -- lanes --------------------------------------------------------------------------------


def one_stage(forward: PassCost, backward: PassCost, micro_batches: int = 1, **end: object) -> Simulation:
    stage = StageCost((ChunkCost({FORWARD: forward, BACKWARD: backward}),), **end)  # type: ignore[arg-type]
    return simulate_cost(StepCost((stage,), micro_batches, "none"))


def blocks(count: int, seconds: float, **more: float) -> PassCost:
    return PassCost(tuple(Piece(f"block {i}", seconds, **more) for i in range(count)))


def test_reductions_run_beside_the_last_backward_pass() -> None:
    """Four blocks of 2 s; the gradients of each take 1.5 s, so only those of the last block are waited for."""
    reductions = tuple(Reduction(1.5, (0, i)) for i in range(4))
    found = one_stage(blocks(4, 1.0), blocks(4, 2.0), 3, reductions=reductions)
    assert found.step_time_s == pytest.approx(3 * 12 + 1.5)
    exposed = one_stage(blocks(4, 1.0), blocks(4, 2.0), 3, reductions=(Reduction(6.0),))
    assert exposed.step_time_s == pytest.approx(3 * 12 + 6)
    slow = one_stage(blocks(4, 1.0), blocks(4, 2.0), 3, reductions=tuple(Reduction(5.0, (0, i)) for i in range(4)))
    assert slow.step_time_s == pytest.approx(2 * 12 + 4 + 2 + 4 * 5)


def test_gathers_come_one_block_ahead() -> None:
    """Shorter than a block: only the first of a pass is waited for. Longer: they set the pace, one after the other."""
    quick = one_stage(blocks(4, 1.0, gather_s=0.5), blocks(4, 2.0))
    assert quick.step_time_s == pytest.approx(0.5 + 4 + 8)
    slow = one_stage(blocks(4, 1.0, gather_s=3.0), blocks(4, 2.0))
    assert slow.step_time_s == pytest.approx(4 * 3 + 1 + 8)
    both = one_stage(blocks(4, 1.0), blocks(4, 2.0, gather_s=0.5, scatter_s=0.75))
    assert both.step_time_s == pytest.approx(4 + 0.5 + 8 + 0.75)
    data = [t.name.split(",")[0] for t in both.tasks if t.lane == DATA]
    assert data == ["gather", "gather", "scatter", "gather", "scatter", "gather", "scatter", "scatter"]


def test_the_end_of_a_step() -> None:
    """Reductions, the exchange between the ends, the optimizer when all are there, parameters on their way back."""
    found = one_stage(blocks(1, 1.0), blocks(1, 2.0), reductions=(Reduction(4.0),), optimizer_s=0.5, returned_s=(2, 2))
    assert found.step_time_s == pytest.approx(3 + 4 + 0.5 + 4)
    cost = step("1f1b", [EVEN] * 3, 4)
    ends = [{"tied_s": 0.25}, {"reductions": (Reduction(5.0),)}, {"tied_s": 0.25}]
    stages = [
        dataclasses.replace(s, optimizer_s=1.0, **end)  # type: ignore[arg-type]
        for s, end in zip(cost.stages, ends, strict=True)
    ]
    found = simulate_cost(dataclasses.replace(cost, stages=tuple(stages)))
    tied = [t for t in found.tasks if t.name == "exchange tied gradients"]
    assert [t.stage for t in tied] == [0, 2] and tied[0].start_s == tied[1].start_s == pytest.approx(18)
    optimizer = {t.start_s for t in found.tasks if t.name == "optimizer"}
    assert len(optimizer) == 1 and optimizer.pop() == pytest.approx(16 + 5)


def test_a_pass_lasts_as_long_as_its_launches() -> None:
    launched = step("1f1b", [EVEN] * 2, 4, host_s=5.0)
    assert simulate_cost(launched).step_time_s == pytest.approx(5 * (4 + 1) * 2)


def test_stages_that_wait_for_each_other_are_named() -> None:
    orders = [tuple(o) for o in schedule_orders("1f1b", 2, 2)]
    orders[0] = (Action(FORWARD, 0), Action(BACKWARD, 0), Action(FORWARD, 1), Action(BACKWARD, 1))
    orders[1] = (Action(FORWARD, 0), Action(FORWARD, 1), Action(BACKWARD, 0), Action(BACKWARD, 1))
    with pytest.raises(AutoparError, match=r"the schedule stands still: stage \d waits with the"):
        simulate_cost(step("1f1b", [EVEN] * 2, 2), orders)
    assert simulate_cost(step("1f1b", [EVEN] * 2, 2), schedule_orders("gpipe", 2, 2)).step_time_s == pytest.approx(9)


def test_a_large_pipeline_takes_less_than_two_seconds() -> None:
    """64 stages of 96 blocks in all, 200 micro-batches."""
    pieces = [PassCost(tuple(Piece(f"block {i}", 1.0, (("tensor axis", 0.1),)) for i in range(n)), 0.1) for n in (1, 2)]
    stages = [StageCost((ChunkCost({FORWARD: pieces[i % 2], BACKWARD: pieces[i % 2]}),)) for i in range(64)]
    began = time.process_time()
    found = simulate_cost(StepCost(tuple(stages), 200, "1f1b", send_s=0.1))
    assert time.process_time() - began < 2
    assert len(found.tasks) > 64 * 200 * 2 * 4
