"""How a number shrinks with the degrees of a layout: a size is a sum of ten kinds of share.

    fixed        does not depend on the batch, whole on every rank of the tensor axis (a norm's weight)
    fixed_cut    the same, cut over the tensor axis (a column of a matrix)
    expert       does not depend on the batch, one part for each expert, whole on the tensor axis
    expert_cut   the same, cut over the tensor axis (columns of the matrices of all experts)
    act          grows with the micro-batch, whole on the tensor axis (the input of a column-parallel product)
    act_cut      the same, cut (heads, the inner width of an MLP)
    act_seq      grows with the micro-batch; whole, but cut with sequence parallelism (norms, dropout, the residual)
    rows, rows_cut, rows_seq    the same three of rows that experts work on

All are of one sequence. The context axis cuts whatever grows with the micro-batch. Expert ranks exchange rows, each
with its own micro-batch: a rank has as many as without them if experts are loaded alike, else the busiest has more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FIXED, FIXED_CUT, EXPERT, EXPERT_CUT, ACT, ACT_CUT, ACT_SEQ, ROWS, ROWS_CUT, ROWS_SEQ = range(10)
KINDS = 10


@dataclass(frozen=True)
class Shape:
    """What a size depends on. micro_batch: sequences. tensor, context, expert: degrees. sequence: sequence parallelism.

    far_pipeline: whether a pipeline spans nodes. load: how many times its even share the busiest expert rank works on.
    """

    micro_batch: int
    tensor: int = 1
    context: int = 1
    sequence: bool = False
    far_pipeline: bool = False
    expert: int = 1
    load: float = 1.0

    @property
    def weights(self) -> Floats:
        """[10]: how many of each kind of share there are; not to be written to."""
        return _weights(self)


@lru_cache(maxsize=1 << 14)
def _weights(shape: Shape) -> Floats:
    t, e, rows = float(shape.tensor), float(shape.expert), shape.micro_batch / shape.context
    grown = (rows, rows / t, rows / t if shape.sequence else rows)
    made = np.array([1.0, 1 / t, 1 / e, 1 / (t * e), *grown, *(shape.load * one for one in grown)])
    made.flags.writeable = False
    return made


def share(amount: float, kind: int) -> Floats:
    """[10]: a size of one kind."""
    made = np.zeros(KINDS)
    made[kind] = amount
    return made


def of_experts(size: Floats) -> Floats:
    """[10]: of numbers that do not grow, those that belong to experts."""
    made = np.zeros(KINDS)
    made[[EXPERT, EXPERT_CUT]] = size[[EXPERT, EXPERT_CUT]]
    return made
