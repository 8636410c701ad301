"""A target that no cluster reaches: how close the best comes, and what would help, found by solving again."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence

from autopar.errors import Infeasible
from autopar.sizing.frontier import Clock, Frontier, OutOfTime, Solved, device_s
from autopar.sizing.goal import Goal
from autopar.sizing.offer import Offer
from autopar.sizing.types import ClusterSizing
from autopar.units import seconds_text, span_text, usd_text

DOUBLINGS = 6  # of the global batch, or of the GPUs, that are tried as remedies


def why_not(frontier: Frontier) -> str:
    """Why nothing on a cluster meets the goal; that which comes nearest."""
    goal, best = frontier.goal, frontier.closest()
    if best is None:
        most = frontier.offer.whole.devices
        if frontier.refusal is None:
            return "no size was solved in the time"
        return f"nothing fits on up to {most:,} GPUs: {frontier.refusal}"
    gpus = f"{best.layout.devices:,} GPUs"
    if best.step_time_s > goal.longest_step_s:
        times = best.step_time_s / goal.longest_step_s
        return (
            f"the fastest step is {seconds_text(best.step_time_s)} ({gpus}), {times:.3g} times the "
            f"{seconds_text(goal.longest_step_s)} it may take"
        )
    usd = frontier.usd(device_s(best))
    assert usd is not None  # a budget without a price is refused before
    return f"the cheapest costs {usd_text(usd)} ({gpus}), {usd / goal.budget_usd:.3g} times the budget"


def refusal(
    frontiers: Sequence[Frontier], sized: Sequence[ClusterSizing], clock: Clock, *, complete: bool
) -> Infeasible:
    """The error for a target that none of the clusters reaches. clock: for finding what would help."""
    goal = frontiers[0].goal
    nearest = min(frontiers, key=_distance)
    names = ", ".join(f"{one.name}: {one.why}" for one in sized)
    found = "no cluster reaches" if complete else "no size that meets was found in the time limit for"
    helps = list(_remedies(nearest, clock))
    remedy = f"on {nearest.offer.name} any one of these would do: {'; '.join(helps)}" if helps else _advice(goal)
    return Infeasible(
        f"{found} {goal.target.text!r} with a global batch of {nearest.predictor.global_batch:,} samples, which stays "
        f"as given: {names}; {remedy}"
    )


def _distance(frontier: Frontier) -> tuple[float, float]:
    """How many times too slow, then how dear, what comes nearest is."""
    best = frontier.closest()
    if best is None:
        return math.inf, math.inf
    slow = max(1.0, best.step_time_s / frontier.goal.longest_step_s)
    return slow, frontier.usd(device_s(best)) or math.inf


def _advice(goal: Goal) -> str:
    limits = [
        name for name, given in (("time", math.isfinite(goal.longest_step_s)), ("money", goal.has_budget)) if given
    ]
    return f"allow more {' or '.join(limits)}, a higher max_gpus, or another global batch"


def _remedies(frontier: Frontier, clock: Clock) -> Iterator[str]:
    """Single changes with each of which the target is met, each solved."""
    best, goal = frontier.closest(), frontier.goal
    if best is None:
        return
    if best.step_time_s <= goal.longest_step_s:
        usd = frontier.usd(device_s(best))
        assert usd is not None
        yield f"a budget of {usd_text(usd)}"
        return
    if goal.target.duration_s is not None:
        yield f"{span_text(best.step_time_s * goal.steps)} instead of {span_text(goal.target.duration_s)}"
    else:
        yield f"a step of {seconds_text(best.step_time_s)}"
    if goal.has_budget:
        return  # what more of anything else costs is another question
    yield from _another_batch(frontier, clock)
    yield from _more_devices(frontier, clock)


def _another_batch(frontier: Frontier, clock: Clock) -> Iterator[str]:
    """A larger one for a run, which then has fewer steps; a smaller one for the time of a step."""
    target, batch = frontier.goal.target, frontier.predictor.global_batch
    for doublings in range(1, DOUBLINGS + 1):
        if target.step_s is None:
            other = batch << doublings
        elif batch % (1 << doublings):
            return
        else:
            other = batch >> doublings
        predictor = copy.copy(frontier.predictor)
        predictor.global_batch = other
        tokens = frontier.goal.per_step // batch
        goal = Goal.of(target, global_batch=other, tokens=tokens if frontier.goal.unit == "tokens" else None)
        solved = _at_most(Frontier(predictor, frontier.offer, goal, frontier.pin, clock))
        if solved is not None and solved.step_time_s <= goal.longest_step_s:
            yield f"a global batch of {other:,}"
            return


def _more_devices(frontier: Frontier, clock: Clock) -> Iterator[str]:
    """Only of what can be had in any number; one that is used whole can do with more."""
    whole = frontier.offer.whole
    if whole.nodes < 2 or whole.links[-1].devices is not None:
        return
    for doublings in range(1, DOUBLINGS + 1):
        larger = dataclasses.replace(whole, nodes=whole.nodes << doublings)
        offer = Offer(frontier.offer.name, larger)
        predictor = frontier.predictor.on(larger)
        predictor.forget_prices()  # groups of ranks may span more nodes than there were
        solved = _at_most(Frontier(predictor, offer, frontier.goal, frontier.pin, clock))
        if solved is None:
            return
        if solved.best is not None and solved.step_time_s <= frontier.goal.longest_step_s:
            yield f"up to {solved.best.layout.devices:,} GPUs"
            return


def _at_most(frontier: Frontier) -> Solved | None:
    """The largest size; None if the time is up."""
    try:
        return frontier.solve(frontier.offer.sizes - 1)
    except OutOfTime:
        return None
