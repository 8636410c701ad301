"""What each pass of a pipeline takes on its rank, and when a step would end if every rank had a core of its own.

With fewer cores than ranks, wall time adds up the work of all and shows no bubble: a rank that waits leaves its core to
others. So the CPU seconds of each pass are recorded in the real run, and the steps that the ranks executed are replayed
with them on simulated time (`autopar/simulating/replay.py`): a pass waits for what it takes, messages take no time, and
what a rank does besides passes (messages, reductions, the loss, the optimizer) follows its last pass.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from autopar.simulating.replay import Step, replay
from autopar.simulating.schedules import BACKWARD, FORWARD, INPUTS, WEIGHTS


class PassTimes:
    """Records the passes of the stages of this rank: torch's, or autopar's, which have the same methods."""

    def __init__(self, stages: Sequence[Any]) -> None:
        self.seconds: dict[Step, list[float]] = defaultdict(list)
        self.besides: list[float] = []
        self._recording, self._inside, self._passes_s = False, False, 0.0
        for stage in stages:
            at = stage.stage_index
            self._wrap(stage, "forward_one_chunk", at, lambda _: FORWARD)
            self._wrap(stage, "backward_one_chunk", at, lambda full: BACKWARD if full else INPUTS)
            self._wrap(stage, "backward_weight_one_chunk", at, lambda _: WEIGHTS)

    @contextmanager
    def step(self, record: bool) -> Iterator[None]:
        """Around a step."""
        self._recording, self._passes_s, begin_s = record, 0.0, time.thread_time()
        yield
        if record:
            self.besides.append(time.thread_time() - begin_s - self._passes_s)

    def _wrap(self, stage: Any, name: str, at: int, kind: Callable[[bool], str]) -> None:
        method = getattr(stage, name)

        def timed(micro_batch: int, *args: Any, full_backward: bool = True, **kwargs: Any) -> Any:
            if name == "backward_one_chunk":
                kwargs["full_backward"] = full_backward
            outer, self._inside = not self._inside, True  # a whole backward pass may call its second part
            begin_s = time.thread_time()
            result = method(micro_batch, *args, **kwargs)
            own_s = time.thread_time() - begin_s
            self._inside = not outer
            if self._recording and outer:
                self.seconds[Step(kind(full_backward), at, micro_batch)].append(own_s)
                self._passes_s += own_s
            return result

        setattr(stage, name, timed)

    def medians(self) -> tuple[dict[Step, float], list[float]]:
        """Of all ranks: seconds of each pass, and by rank what a step takes besides."""
        mine = {step: statistics.median(found) for step, found in self.seconds.items()}
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, (mine, statistics.median(self.besides)))
        return {step: s for passes, _ in of_ranks for step, s in passes.items()}, [besides for _, besides in of_ranks]


def step_s(steps: Sequence[Sequence[Step]], seconds: Mapping[Step, float], besides: Sequence[float]) -> float:
    """A step with a core for every rank. steps: that each rank executes."""
    passes = replay(steps, seconds.__getitem__).passes
    return max(rank[-1].end_s + more for rank, more in zip(passes, besides, strict=True))
