"""The report of a plan: what was chosen, what it costs, what else was considered, what was assumed."""

from __future__ import annotations

import html
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autopar.baselines import Baseline
from autopar.errors import AutoparError
from autopar.placements import State, shard_dim
from autopar.plans import Plan

ASSUMPTIONS = (
    "times come from the cluster description alone (rooflines and alpha-beta collectives), not from a measurement here",
    "communication and compute are added up: overlap in the running program is a bonus that is not counted",
    "memory is the sum of the tensors alive, without the fragmentation of an allocator",
    "outputs of the model other than the loss are dropped before the backward pass; of a model that returns no loss, "
    "all outputs and their gradients are held, and what the caller's loss takes besides is not counted",
)


@dataclass(frozen=True)
class Report:
    """Why a plan is what it is. Print it, or take `to_dict()`, or write `to_html(path)`.

    baselines: the usual layouts; None if they were not priced (a plan that was loaded from a file).
    """

    plan: Plan
    baselines: tuple[Baseline, ...] | None = None

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def to_dict(self) -> dict[str, Any]:
        """Everything the text says, as data."""
        plan = self.plan
        return {
            "cluster": plan.cluster.name,
            "devices": plan.devices,
            "mesh": list(plan.mesh),
            "axes": list(plan.roles),
            "layout": plan.layout(),
            **plan.predicted,
            "memory_limit_bytes": plan.options.memory_limit_bytes,
            "solver": {
                "status": plan.status,
                "objective_s": plan.objective_s,
                "bound_s": plan.bound_s,
                "gap": plan.gap,
                "meshes": [{**c.__dict__, "mesh": list(c.mesh)} for c in plan.candidates],
            },
            "parameters": _parameter_table(plan),
            "recomputed_ops": sorted(n for n, d in plan.decisions.nodes.items() if d.recompute),
            "baselines": None if self.baselines is None else [b.to_dict() for b in self.baselines],
            "replicated_for_want_of_a_rule": list(plan.unruled),
            "pins": dict(plan.options.pin),
            "assumptions": list(ASSUMPTIONS),
        }

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained page."""
        text = html.escape(str(self))
        title = html.escape(f"autopar: {self._headline()}")
        page = f"<!doctype html><meta charset=utf-8><title>{title}</title><pre>{text}</pre>\n"
        try:
            Path(path).write_text(page)
        except OSError as error:
            raise AutoparError(f"cannot write report {path}: {error.strerror or error}") from error

    # -- text ----------------------------------------------------------------------

    def _headline(self) -> str:
        plan = self.plan
        return f"plan for {plan.devices} x {plan.cluster.device.name}, global batch {plan.options.global_batch}"

    def _lines(self) -> list[str]:
        plan = self.plan
        return [
            self._headline(),
            "",
            *self._layout_lines(),
            "",
            *self._time_lines(),
            "",
            *self._memory_lines(),
            "",
            *_parameter_lines(plan),
            "",
            *self._baseline_lines(),
            *self._rule_lines(),
            "assumed:",
            *(f"  - {text}" for text in ASSUMPTIONS),
        ]

    def _layout_lines(self) -> list[str]:
        plan = self.plan
        words = {
            "dp": "data parallel: the batch is cut, weights are used whole",
            "tp": "tensor parallel: weights are used in parts",
            "none": "no matrix product is cut on this axis",
        }
        lines = ["layout"]
        for axis, (size, role) in enumerate(zip(plan.mesh, plan.roles, strict=True)):
            lines.append(f"  axis {axis} of {size} ranks: {words[role]}")
        if not plan.mesh:
            lines.append("  one device: nothing is cut")
        layout = plan.layout()
        stored = {0: "whole on every data rank", 2: "cut over the data ranks, gathered once a step"}
        zero = stored.get(layout["zero"], "cut over the data ranks, gathered again in the backward pass")
        if layout["dp"] > 1:
            lines.append(f"  parameters are stored {zero} (ZeRO stage {layout['zero']})")
        if layout["sp"]:
            lines.append("  between tensor parallel blocks the sequence is cut (Megatron sequence parallelism)")
        again = sum(d.recompute for d in plan.decisions.nodes.values())
        lines.append(f"  {again} of {len(plan.decisions.nodes)} ops run again in the backward pass to save memory")
        proven = "optimal" if plan.status == "optimal" else "best found in time"
        lines.append(f"  {proven}: no plan in this search space is more than {plan.gap:.2%} faster (proven bound)")
        if plan.options.pin:
            lines.append(f"  pinned by you: {dict(plan.options.pin)}")
        return lines

    def _time_lines(self) -> list[str]:
        figures = self.plan.predicted
        parts = figures["breakdown"]
        total = figures["step_time_s"] or 1.0
        lines = [
            f"time of a step: {_seconds(figures['step_time_s'])}, {figures['tokens_per_s_per_gpu']:.0f} tokens/s per "
            f"device, MFU {figures['mfu']:.1%}"
        ]
        for key, name in (
            ("forward_s", "forward"),
            ("backward_s", "backward"),
            ("recompute_s", "recomputation"),
            ("communication_s", "communication"),
            ("optimizer_s", "optimizer"),
        ):
            lines.append(f"  {name:<15}{_seconds(parts[key]):>12}  {parts[key] / total:6.1%}")
        for kind, seconds in parts["communication_by_kind_s"].items():
            lines.append(f"    of it {kind:<28}{_seconds(seconds):>12}")
        return lines

    def _memory_lines(self) -> list[str]:
        figures, limit = self.plan.predicted, self.plan.options.memory_limit_bytes
        lines = [
            f"peak memory of a rank: {size_text(figures['peak_bytes'])} of {size_text(limit)}, "
            f"in the {figures['breakdown']['peak_at']}"
        ]
        for name, nbytes in figures["breakdown"]["memory_bytes"].items():
            lines.append(f"  {name:<15}{size_text(nbytes):>12}")
        return lines

    def _baseline_lines(self) -> list[str]:
        if self.baselines is None:
            return ["the usual layouts were not priced: the plan was loaded without its model", ""]
        lines = ["the usual layouts, priced the same way"]
        ours = self.plan.predicted["step_time_s"]
        for row in self.baselines:
            if row.step_time_s is None:
                lines.append(f"  {row.name:<34}{row.reason}")
            else:
                ratio = row.step_time_s / ours if ours else math.inf
                time, memory = _seconds(row.step_time_s), size_text(row.peak_bytes or 0)
                lines.append(f"  {row.name:<34}{time:>12}  {ratio:6.2f} x  {memory:>12}")
        return [*lines, ""] if self.baselines else []

    def _rule_lines(self) -> list[str]:
        plan = self.plan
        if not plan.unruled:
            return ["every op has a sharding rule", ""]
        names = ", ".join(plan.unruled[:6]) + (" ..." if len(plan.unruled) > 6 else "")
        return [f"{len(plan.unruled)} ops ran replicated for want of a rule: {names}", ""]


def _parameter_table(plan: Plan) -> list[dict[str, Any]]:
    groups: dict[tuple[str, State], list[str]] = {}
    for fqn, state in plan.decisions.params.items():
        groups.setdefault((_pattern(fqn), state), []).append(fqn)
    return [{"parameters": name, "count": len(names), "placement": list(s)} for (name, s), names in groups.items()]


def _parameter_lines(plan: Plan) -> list[str]:
    lines = ["parameters (stored placement per mesh axis)"]
    for row in _parameter_table(plan):
        lines.append(f"  {row['parameters']:<44}{row['count']:>4} x  {', '.join(row['placement']) or 'whole'}")
    cut = Counter(any(shard_dim(p) is not None for p in s) for s in plan.decisions.params.values())
    lines.append(f"  {cut[True]} cut, {cut[False]} whole on every rank")
    return lines


def _pattern(fqn: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in fqn.split("."))


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3f} ms"


def size_text(nbytes: float) -> str:
    """Bytes for people."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} B"
