"""How a number shrinks with the degrees of a layout: a size is a sum of five kinds of share.

    fixed        does not depend on the batch, whole on every rank of the tensor axis (a norm's weight)
    fixed_cut    the same, cut over the tensor axis (a column of a matrix)
    act          grows with the micro-batch, whole on the tensor axis (the input of a column-parallel product)
    act_cut      the same, cut (heads, the inner width of an MLP)
    act_seq      grows with the micro-batch; whole, but cut with sequence parallelism (norms, dropout, the residual)

All are of one sequence. The context axis cuts whatever grows with the micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FIXED, FIXED_CUT, ACT, ACT_CUT, ACT_SEQ = range(5)
KINDS = 5


@dataclass(frozen=True)
class Shape:
    """What a size depends on. micro_batch: sequences. tensor, context: degrees. sequence: sequence parallelism.
    far_pipeline: whether a pipeline spans nodes.
    """

    micro_batch: int
    tensor: int = 1
    context: int = 1
    sequence: bool = False
    far_pipeline: bool = False

    @property
    def weights(self) -> Floats:
        """[5]: how many of each kind of share there are."""
        t, rows = float(self.tensor), self.micro_batch / self.context
        return np.array([1.0, 1 / t, rows, rows / t, rows / t if self.sequence else rows])


def share(amount: float, kind: int) -> Floats:
    """[5]: a size of one kind."""
    made = np.zeros(KINDS)
    made[kind] = amount
    return made
