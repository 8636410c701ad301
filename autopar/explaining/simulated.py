"""The time line of a simulated step: the lanes of a few pipeline stages, each on a track of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from autopar.explaining.spans import Span, TimeLine
from autopar.simulating.costs import COMPUTE, HOST, LANES
from autopar.simulating.engine import Task
from autopar.simulating.schedules import FORWARD
from autopar.simulating.simulation import Simulation

MOST_STAGES = 6
MOST_SPANS = 6000  # beyond, a pass is drawn as one stretch
NOTE = "Simulated event by event: what shares a lane runs one after the other, and lanes run beside each other."
COARSE = "A pass is drawn from its beginning to its end, messages inside of it not apart; shares are exact."


def simulated_line(simulation: Simulation) -> TimeLine:
    """A simulated step, as a report draws it."""
    stages = drawn_stages(simulation.stages)
    tasks = [task for task in simulation.tasks if task.stage in stages]
    alone = simulation.stages == 1
    notes = [NOTE]
    if len(stages) < simulation.stages:
        notes.append(f"Drawn are stages {', '.join(map(str, stages))} of {simulation.stages}.")
    spans = [_span(task, alone) for task in tasks]
    totals: dict[tuple[str, str], float] = defaultdict(float)
    for span in spans:
        totals[span.track, span.kind] += span.seconds
    if len(spans) > MOST_SPANS:
        spans = list(_passes(tasks, alone))
        notes.append(COARSE)
    tracks = tuple(_track(stage, lane, alone) for stage in stages for lane in LANES)
    return TimeLine(tuple(sorted(spans, key=lambda s: s.start_s)), " ".join(notes), tracks, dict(totals))


def drawn_stages(stages: int) -> Sequence[int]:
    """All stages, or a few evenly, the first and the last among them."""
    if stages <= MOST_STAGES:
        return range(stages)
    return sorted({round(i * (stages - 1) / (MOST_STAGES - 1)) for i in range(MOST_STAGES)})


def _span(task: Task, alone: bool) -> Span:
    number = "" if task.micro_batch < 0 else f", micro-batch {task.micro_batch}"
    return Span(_track(task.stage, task.lane, alone), kind_of(task), f"{task.name}{number}", task.start_s, task.end_s)


def _track(stage: int, lane: str, alone: bool) -> str:
    return lane if alone else f"stage {stage}: {lane}"


def kind_of(task: Task) -> str:
    """In the words of `autopar.explaining.spans`."""
    if task.lane == HOST:
        return "launches"
    if task.lane != COMPUTE:
        return "communication"
    if task.micro_batch < 0:
        return "optimizer"
    if task.name.endswith(" again"):
        return "recomputation"
    return "forward" if task.name.startswith(FORWARD) else "backward"


def _passes(tasks: Iterable[Task], alone: bool) -> Iterable[Span]:
    """What a lane does in one pass of one micro-batch, as one stretch; what belongs to no pass stays as it is."""
    held: dict[tuple[int, str], Task] = {}
    for task in tasks:
        key = (task.stage, task.lane)
        before = held.get(key)
        if before is not None and _one_pass(before, task):
            held[key] = before._replace(end_s=task.end_s)
            continue
        if before is not None:
            yield _span(before, alone)
        held[key] = task._replace(name=task.name.partition(",")[0]) if task.micro_batch >= 0 else task
    yield from (_span(task, alone) for task in held.values())


def _one_pass(before: Task, task: Task) -> bool:
    return (
        task.micro_batch >= 0
        and (before.micro_batch, before.chunk) == (task.micro_batch, task.chunk)
        and before.name == task.name.partition(",")[0]
    )
