"""Predictions for people: one in full, several as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autopar.fixes import lines as fix_lines
from autopar.layout_text import short
from autopar.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from autopar.choosing.shortfall import Shortfall
    from autopar.fixes import Fix
    from autopar.predicting.predict import Prediction
    from autopar.simulating.simulation import Simulation


def describe(predictions: Sequence[Prediction], simulation: Simulation | None = None) -> str:
    """One prediction with where its time and memory go; several as a table in their order, the fastest that fits
    marked. simulation: of the one, if it was simulated."""
    return _one(predictions[0], simulation) if len(predictions) == 1 else _table(predictions)


def _one(prediction: Prediction, simulation: Simulation | None) -> str:
    seconds = {k.removesuffix("_s"): v for k, v in prediction.breakdown.items() if k.endswith("_s") and v}
    held = {k: v for k, v in prediction.breakdown["memory_bytes"].items() if v}
    rows = [
        ("layout", str(prediction.layout)),
        ("step", f"{seconds_text(prediction.step_time_s)}, {_rates(prediction)}"),
        ("where time goes", ", ".join(f"{k} {seconds_text(v)}" for k, v in seconds.items())),
        ("memory", f"{bytes_text(prediction.peak_bytes)} on the fullest device: {_fit(prediction)}"),
        ("where memory goes", ", ".join(f"{k} {bytes_text(v)}" for k, v in held.items())),
    ]
    if simulation is not None:
        rows.append(("simulated", _simulated(simulation)))
    return "\n".join(f"{name:<18} {text}" for name, text in rows)


def lacking(shortfall: Shortfall, fixes: tuple[Fix, ...]) -> str:
    """What a layout that does not fit is short by, and what would help, one change a line."""
    return "\n".join([f"{'does not fit':<18} {shortfall}", "any one of these makes it fit:", *fix_lines(fixes)])


def _simulated(simulation: Simulation) -> str:
    least, most = min(simulation.idle_share), max(simulation.idle_share)
    idle = f"{least:.1%}" if simulation.stages == 1 else f"{least:.1%} to {most:.1%} by stage"
    held = f"{bytes_text(simulation.peak_bytes)} on the fullest device"
    return f"{seconds_text(simulation.step_time_s)} event by event, devices idle {idle}, {held}"


def _rates(prediction: Prediction) -> str:
    tokens = f"{prediction.tokens_per_s_per_gpu:,.0f} tokens/s on a device"
    return f"{tokens}, MFU {prediction.mfu:.1%}, HFU {prediction.hfu:.1%}"


def _fit(prediction: Prediction) -> str:
    return "fits" if prediction.fits else "does not fit"


def _table(predictions: Sequence[Prediction]) -> str:
    possible = [p for p in predictions if p.fits]
    best = min(possible, key=lambda p: p.step_time_s, default=None)
    lines = [f"  {'step':>12} {'tokens/s':>10} {'MFU':>7} {'memory':>12}  layout"]
    for p in predictions:
        figures = f"{seconds_text(p.step_time_s):>12} {p.tokens_per_s_per_gpu:>10,.0f} {p.mfu:>7.1%}"
        mark, full = "*" if p is best else " ", "" if p.fits else "  (does not fit)"
        lines.append(f"{mark} {figures} {bytes_text(p.peak_bytes):>12}  {short(p.layout)}{full}")
    lines.append("* the fastest that fits" if best is not None else "none of them fits")
    return "\n".join(lines)
