"""What the page of a plan by degrees shows besides its figures, in the keys of every report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autopar.explaining.alternatives import Alternative
from autopar.explaining.degrees import degree_table
from autopar.explaining.measured import error_bars
from autopar.explaining.memory_line import memory_line
from autopar.explaining.simulated import simulated_line
from autopar.explaining.stage_memory import stage_memory_rows
from autopar.predicting.predict import Predictor
from autopar.simulating.simulate import simulate_layout
from autopar.units import seconds_text

if TYPE_CHECKING:
    from autopar.choosing.report import LayoutReport

HOW_WHY_NOT = "Chosen again, all else free, with one condition more"
HOW_FASTER = "The best layout, chosen again with one part of the cluster 10 % faster"


def page_data(report: LayoutReport) -> dict[str, Any]:
    """The keys; None where it takes the model, and the plan was loaded without."""
    plan, used = report.plan, report.plan.cluster.part(report.plan.named.devices)
    figures = plan.predicted
    return {
        "kind": "plan",
        "model": plan.options.model,
        "device": plan.cluster.device.name,
        "nodes": plan.cluster.nodes,
        "global_batch": plan.options.global_batch,
        "optimizer": plan.options.optimizer,
        "error_bars": error_bars(used, figures["step_time_s"], figures["peak_bytes"]),
        "degrees": degree_table(plan.named, used),
        "next_best_how": HOW_WHY_NOT,
        "faster_how": HOW_FASTER,
        "memory_at_peak": [{"name": "fullest device", "bytes": dict(figures["breakdown"]["memory_bytes"])}],
        **(_with_model(report, report.predictor.on(used)) if report.predictor is not None else _WITHOUT_MODEL),
    }


_WITHOUT_MODEL: Mapping[str, Any] = dict.fromkeys(("time_line", "memory_line", "next_best", "faster", "memory"))


def _with_model(report: LayoutReport, predictor: Predictor) -> dict[str, Any]:
    plan = report.plan
    simulation = simulate_layout(predictor, plan.named)
    line = simulated_line(simulation)
    lengths = (
        f"It takes {seconds_text(simulation.step_time_s)}, by the plan's closed form {seconds_text(plan.objective_s)}."
    )
    return {
        "time_line": replace(line, note=f"{line.note} {lengths}").to_dict(),
        "memory_at_peak": stage_memory_rows(predictor, plan.named),
        "memory_line": memory_line(simulation),
        "next_best": [_row(a, plan.layout()) for a in report.alternatives],
        "memory": _memory(report),
        "faster": [
            {
                "what": w.what,
                "step_time_s": w.step_time_s,
                "extra_s": -w.saves_s,
                "share": -w.saves_s / plan.objective_s,
            }
            for w in sorted(report.worths, key=lambda w: -w.saves_s)
            if not w.of_memory
        ],
    }


def _row(alternative: Alternative, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """An alternative by the keys that its condition names."""
    keys = [part.partition("=")[0] for part in alternative.condition.split(" and ")]
    other = alternative.plan.layout() if alternative.plan is not None else {}
    different = ", ".join(f"{k}={v}" for k, v in other.items() if v != chosen.get(k) and v is not None)
    named = ", ".join(f"{key}={chosen.get(key)}" for key in keys)
    return {**alternative.to_dict(), "decision": alternative.condition, "chosen": named, "instead": different}


def _memory(report: LayoutReport) -> dict[str, Any] | None:
    """The price of a byte, from what one GiB more brings."""
    found = next((w for w in report.worths if w.of_memory), None)
    if found is None:
        return None
    saves = f"saves {seconds_text(found.saves_s)} a step" if found.saves_s > 0 else "makes no layout faster"
    return {
        "binds": found.saves_s > 0,
        "seconds_per_byte": max(0.0, found.saves_s) / (1 << 30),
        "lines": [f"{found.what} {saves}"],
    }
