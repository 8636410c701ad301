"""What no layout of a group or a cell can be faster than.

Only what follows from the pipeline's algebra is used: the slowest of p stages takes at least the average one's time and
at least that of the most blocks that some stage must hold; what a pipeline adds to it is at least what the best
schedule adds. Messages between stages, gradients, the optimizer and recomputation come on top and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autopar.choosing.space import Group
from autopar.predicting.predict import Predictor
from autopar.predicting.sizes import Floats, Shape
from autopar.predicting.stages import Stage
from autopar.predicting.table import Pass
from autopar.predicting.work import Work

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GroupCosts:
    """Seconds of one micro-batch: through the model forward, forward and backward, and through the fastest block."""

    forward_s: float
    both_s: float
    block_s: float

    @staticmethod
    def of(predictor: Predictor, group: Group) -> GroupCosts:
        """As if the pipeline were on one node, which is never slower."""
        table = predictor.table
        shape = predictor.shape(group.layout(1, group.least_dp))
        forward, backward = Work(), Work()
        for part, times in Stage.whole(table).parts(table):
            forward += predictor.pricer.work(part.forward, shape) * times
            backward += predictor.pricer.work(part.backward, shape) * times
        each = [_seconds(predictor, b.forward, shape) + _seconds(predictor, b.backward, shape) for b in table.kinds]
        block_s = min(each, default=0.0)
        return GroupCosts(forward.seconds, forward.seconds + backward.seconds, block_s)


def _seconds(predictor: Predictor, of: Pass, shape: Shape) -> float:
    return predictor.pricer.work(of, shape).seconds


def cell_bounds_s(costs: GroupCosts, blocks: int, pp: Ints, micro_batches: Ints, schedule: str | None = None) -> Floats:
    """Seconds that no layout of a cell is below, for arrays of cells of one group. schedule: where one is pinned."""
    slowest = np.maximum(costs.both_s / pp, -(-blocks // pp) * costs.block_s)
    others = costs.both_s - slowest
    around = [others]
    if schedule in (None, "interleaved"):
        around.append(np.where(micro_batches % pp == 0, others / np.maximum(1, blocks // pp), others))
    if schedule in (None, "zero-bubble"):
        around.append(costs.forward_s - slowest)
    pipelined = micro_batches * slowest + np.maximum(0.0, np.minimum.reduce(around))
    return np.where(pp == 1, micro_batches * costs.both_s, pipelined)
