"""How a framework runs a layout: what people call its settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """Defaults are those of a careful eager framework of today.

    fusion: see `autopar.predicting.fusing`. eager: the host dispatches every aten op, not every kernel.
    overlap: gradient reductions run beside the last backward pass.
    accumulates_apart: gradients are added to their sum by a kernel of its own, not by the product that makes them.
    keeps_gathered: with sequence parallelism, the gathered inputs of products are kept for the backward pass.
    """

    fusion: str = "all"
    eager: bool = True
    overlap: bool = True
    accumulates_apart: bool = True
    keeps_gathered: bool = False
