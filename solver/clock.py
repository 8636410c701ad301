"""How long a search may take: in seconds, or in work where its answer must not depend on how fast a machine is."""

from __future__ import annotations

import math
import time


class Clock:
    """Wall time since the start, and work done, against an optional limit of each.

    limit_s: in seconds. work: one simplex iteration on a model of one row or column is a unit of it, some 1e-8 s.
    """

    def __init__(self, limit_s: float | None, work: float | None = None) -> None:
        self.started, self.limit_s = time.perf_counter(), limit_s
        self.work_left = math.inf if work is None else work

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    def left_s(self) -> float | None:
        return None if self.limit_s is None else self.limit_s - self.elapsed_s()

    def iterations_left(self, size: int) -> int | None:
        """Of the simplex on a model of so many rows and columns."""
        return None if math.isinf(self.work_left) else max(0, math.ceil(self.work_left / max(1, size)))

    def spend(self, iterations: int, size: int) -> None:
        """Count simplex iterations on a model of so many rows and columns."""
        self.work_left -= iterations * size

    def out(self) -> bool:
        left = self.left_s()
        return self.work_left <= 0 or (left is not None and left <= 0)
