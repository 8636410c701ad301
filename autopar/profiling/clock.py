"""How long a call takes on this device, on a machine where other things run too.

A sample is a batch of calls long enough for the clock; the lower quartile of many short samples is the time that the
device needs when nobody interferes, without the luck of the very best one. On a CPU with one thread the clock is that
of the thread, which does not run while others have the core.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WARM_UP_CALLS = 2
SAMPLE_S = 3e-4  # well above the resolution of any clock, well below the time slice of a scheduler
LEAST_SAMPLES, MOST_SAMPLES = 5, 200


@dataclass(frozen=True)
class Clock:
    """Times calls on one device.

    device: "cpu", or a CUDA device: then events on its stream are read, after a warm-up, with the device idle before.
    budget_s: about how long one measurement may take (at least LEAST_SAMPLES calls are made).
    """

    device: torch.device
    budget_s: float

    def seconds(self, call: Callable[[int], object]) -> float:
        """Seconds of one `call(i)`; `i` counts up, so that the call can take turns with its inputs."""
        for i in range(WARM_UP_CALLS):
            call(i)
        once_s = self._batch(call, 0, 1)
        calls = max(1, min(1000, round(SAMPLE_S / max(once_s, 1e-7))))
        samples = max(LEAST_SAMPLES, min(MOST_SAMPLES, round(self.budget_s / max(once_s * calls, SAMPLE_S))))
        return lower_quartile([self._batch(call, i * calls, calls) / calls for i in range(samples)])

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _batch(self, call: Callable[[int], object], start: int, calls: int) -> float:
        if self.device.type == "cuda":
            return self._cuda_batch(call, start, calls)
        now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        began = now()
        for i in range(start, start + calls):
            call(i)
        return now() - began

    def _cuda_batch(self, call: Callable[[int], object], start: int, calls: int) -> float:
        """Between two events on the stream. Launches that are slower than their kernels leave the device idle between
        them, and that counts: it is what a program of such ops takes."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        first.record()
        for i in range(start, start + calls):
            call(i)
        last.record()
        self.synchronize()
        return float(first.elapsed_time(last)) / 1e3


def lower_quartile(samples: Sequence[float]) -> float:
    """The value that a quarter of the samples do not exceed."""
    return sorted(samples)[(len(samples) - 1) // 4]
