"""Which sizes to search: a grid of doublings, then bisection where the fewest, the cheapest or the fastest may lie."""

from __future__ import annotations

from autopar.sizing.frontier import TOLERANCE, Frontier, Interval, OutOfTime, Progress, device_s


def explore(frontier: Frontier, progress: Progress | None = None) -> bool:
    """Search until the fewest is exact, the cheapest and (within a budget) the fastest are so within TOLERANCE.

    False if the time was up before that.
    """
    try:
        for index in grid(frontier):
            if frontier.solve(index, progress).bound_s > frontier.goal.longest_step_s:
                break  # nor can a smaller one
        while (interval := next_interval(frontier)) is not None:
            frontier.solve(frontier.middle(interval), progress)
    except OutOfTime:
        return False
    return frontier.clock.left_s > 0


def grid(frontier: Frontier) -> list[int]:
    """Indices, largest first: the largest size, and doublings down to the first that can meet the goal."""
    offer = frontier.offer
    doublings = (offer.index(1 << k) for k in range(offer.whole.devices.bit_length()))
    return sorted({offer.sizes - 1, *(index for index in doublings if index > frontier.hopeless)}, reverse=True)


def next_interval(frontier: Frontier) -> Interval | None:
    """Where a better answer to one of the three questions may lie; None if nowhere."""
    intervals, meeting = frontier.open_intervals(), frontier.meeting()
    if not meeting:
        return min(intervals, key=lambda i: i.cheapest_device_s, default=None)
    fewest = frontier.offer.index(meeting[0].layout.devices)
    fewer = [i for i in intervals if i.low < fewest]
    if fewer:
        return fewer[0]
    cheapest = min(map(device_s, meeting)) * (1 - TOLERANCE)
    cheaper = [i for i in intervals if i.cheapest_device_s < cheapest]
    if cheaper:
        return min(cheaper, key=lambda i: i.cheapest_device_s)
    fastest = min(best.step_time_s for best in meeting) * (1 - TOLERANCE)
    return min((i for i in intervals if i.fastest_s < fastest), key=lambda i: i.fastest_s, default=None)


def cheaper_by(frontier: Frontier) -> float:
    """How much cheaper than the cheapest found a size can still be, relative."""
    meeting = frontier.meeting()
    if not meeting:
        return 0.0
    best = min(map(device_s, meeting))
    return max(0.0, 1 - min((i.cheapest_device_s for i in frontier.open_intervals()), default=best) / best)


def fewest_is_proven(frontier: Frontier) -> bool:
    """Whether no size below the fewest found can meet the goal."""
    meeting = frontier.meeting()
    fewest = frontier.offer.index(meeting[0].layout.devices) if meeting else frontier.offer.sizes
    may = [i for i in frontier.open_intervals() if i.low < fewest]
    below = (s for i, s in frontier.solved.items() if i < fewest and s.bound_s < s.step_time_s)
    return not may and not any(s.bound_s <= frontier.goal.longest_step_s for s in below)
