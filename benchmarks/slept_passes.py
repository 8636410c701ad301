"""A pipeline whose passes sleep for as long as they would compute: real processes, messages and schedules, wall clock.

With fewer cores than ranks, wall time shows no bubble (see `pass_times.py`). A rank that sleeps needs no core, so that
here every rank is as if it had one. What a pass takes is given: the floating-point operations of its ops, counted while
it runs once, over a rate. So the times of all schedules come from the same work, and only their order and their waiting
differ. Values are zeros: nothing is trained.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from autopar.runtime.stage import Stage
from autopar.simulating.replay import Step, replay
from autopar.simulating.schedules import BACKWARD, INPUTS, WEIGHTS

Run = Callable[[list[Any]], Sequence[Any]]


class SleptPasses:
    """Passes of this rank's stages that run once, and sleep from then on."""

    def __init__(self, stages: Sequence[Stage], flops_per_s: float) -> None:
        self.flops_per_s = flops_per_s
        self.flops: dict[tuple[str, int], int] = {}  # of a pass, by kind and stage
        for stage in stages:
            for kind, one in stage.passes.items():
                one.run = self._instead(one.run, (kind, stage.stage_index))

    def _instead(self, run: Run, key: tuple[str, int]) -> Run:
        kept: list[torch.Tensor] = []

        def counted_or_slept(inputs: list[Any]) -> Sequence[Any]:
            if key in self.flops:
                inputs.clear()
                time.sleep(self.flops[key] / self.flops_per_s)
            else:
                with FlopCounterMode(display=False) as counter:
                    results = run(inputs)
                self.flops[key] = counter.get_total_flops()
                kept.extend(torch.zeros_like(result) for result in results)
            return list(kept)

        return counted_or_slept

    def alone_s(self, executed: Sequence[Sequence[Step]]) -> float:
        """The step without what messages and the ranks' other work take: the times of all ranks, replayed."""
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, self.flops)
        seconds = {key: flops / self.flops_per_s for rank in ranks for key, flops in rank.items()}

        def of(step: Step) -> float:
            kinds = (INPUTS, WEIGHTS) if step.kind == BACKWARD else (step.kind,)
            return sum(seconds[kind, step.stage] for kind in kinds)

        return max(rank[-1].end_s for rank in replay(executed, of).passes)


def slept_step_s(run: Callable[[], object], steps: int) -> float:
    """Median wall seconds of a step on all ranks together, after two that don't count: the first counts operations."""
    seconds = []
    for _ in range(2 + steps):
        dist.barrier()
        begin_s = time.perf_counter()
        run()
        dist.barrier()
        seconds.append(time.perf_counter() - begin_s)
    return statistics.median(seconds[2:])
