"""Bytes of one number of a model, by what it is kept for."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.cost.dtypes import itemsize
from autopar.layouts import Layout
from autopar.predicting.table import ModelTable


@dataclass(frozen=True)
class Precision:
    """Bytes of one number: a parameter, its gradient as it is summed, the optimizer's state with the master copy."""

    parameter: int
    gradient: int
    state: int

    @staticmethod
    def of(table: ModelTable, layout: Layout, states_per_param: int) -> Precision:
        """Narrow parameters have a master copy in float32 (Micikevicius et al. 2018), and state in float32."""
        gradient = table.itemsize if layout.grad_dtype is None else itemsize(layout.grad_dtype)
        gradient = max(gradient, table.itemsize) if table.itemsize > 4 else gradient
        master = 4 if table.itemsize < 4 and states_per_param else 0
        return Precision(table.itemsize, gradient, master + states_per_param * max(4, table.itemsize))
