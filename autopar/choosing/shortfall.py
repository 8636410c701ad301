"""What a layout lacks: how many bytes, on which stage, and when."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.layouts import Layout
from autopar.predicting.memory import StageMemory, rises
from autopar.predicting.predict import Predictor
from autopar.predicting.table import ModelTable, Part
from autopar.units import bytes_text


@dataclass(frozen=True)
class Shortfall:
    """Bytes beyond the limit on the fullest of `stages` stages, the `stage`-th. moment: when its peak is."""

    short_by_bytes: int
    stage: int
    stages: int
    moment: str
    memory: StageMemory

    @property
    def where(self) -> str:
        """For people, with what the bytes are."""
        m = self.memory
        held = {
            "states": m.parameters + m.gradients + m.optimizer,
            "activations": m.activations,
            "temporaries": m.temporaries,
            "allocator": m.allocator,
        }
        shown = ", ".join(f"{k} {bytes_text(v)}" for k, v in sorted(held.items(), key=lambda kv: -kv[1]) if v)
        stage = f"stage {self.stage}, " if self.stages > 1 else ""
        return f"{stage}{self.moment} ({shown})"

    def __str__(self) -> str:
        return f"short by {bytes_text(self.short_by_bytes)} {'on ' if self.stages > 1 else ''}{self.where}"


def shortfall(predictor: Predictor, layout: Layout) -> Shortfall:
    """Of a layout; negative bytes if it fits."""
    at, stage, memory = predictor.fullest(layout)
    job, table = predictor.job(layout), predictor.table
    peaks = [
        (bytes_above, f"the {'backward' if later else 'forward'} pass of {_name(part, table)}")
        for part, _ in stage.parts(table)
        for later, bytes_above in enumerate(rises(part, job))
    ]
    above, moment = max(peaks, key=lambda pair: pair[0], default=(0.0, ""))
    moment = f"in {moment}" if above > 0 else "between its forward and backward passes"
    short = round(memory.total) - predictor.limit_bytes
    return Shortfall(short, at, len(predictor.stages(layout)), moment, memory)


def _name(part: Part, table: ModelTable) -> str:
    if table.is_block(part):
        own = next((name for name, one in zip(table.names, table.own, strict=False) if one is part), "")
        return f"block {own}" if own else "a block"
    return "what comes before the blocks" if part is table.before else "what comes after the blocks"
