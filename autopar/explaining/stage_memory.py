"""What every pipeline stage of a layout holds at its peak."""

from __future__ import annotations

from typing import Any

from autopar.layouts import Layout
from autopar.predicting.predict import Predictor


def stage_memory_rows(predictor: Predictor, layout: Layout) -> list[dict[str, Any]]:
    """What each pipeline stage holds at its peak, by kind."""
    found = []
    for at, stage in enumerate(predictor.stages(layout)):
        held = vars(predictor.stage_memory(layout, stage, at))
        name = f"stage {at}, {stage.blocks} blocks" if layout.pp > 1 else "every device"
        found.append({"name": name, "bytes": {kind: round(nbytes) for kind, nbytes in held.items()}})
    return found
