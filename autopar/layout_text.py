"""A layout in few words."""

from __future__ import annotations

from autopar.layout_reading import written
from autopar.layouts import DEGREES, Layout


def short(layout: Layout) -> str:
    """The layout without what has its default; `parse_layout` reads it back."""
    keys = layout.to_dict()
    shown = [f"{k}={written(keys[k])}" for k in DEGREES if keys[k] != 1]
    shown += [f"micro_batch={keys['micro_batch']}", f"zero={keys['zero']}"]
    if keys["tp"] != 1:
        shown.append(f"sp={'true' if keys['sp'] else 'false'}")
    if keys["recompute"] != "none":
        shown.append(f"recompute={keys['recompute']}")
    if keys["recompute_blocks"] is not None:
        shown.append(f"recompute_blocks={keys['recompute_blocks']}")
    if keys["offload"] != "none":
        shown.append(f"offload={keys['offload']}")
    if keys["pp"] > 1:
        shown.append(f"schedule={keys['schedule']}")
    return ",".join(shown)
