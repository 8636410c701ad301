"""A report on one screen."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from autopar.explaining.alternatives import Alternative
from autopar.explaining.attribution import folded
from autopar.explaining.faster import Faster
from autopar.explaining.measured import error_bars
from autopar.placements import State, shard_dim
from autopar.plans import Plan
from autopar.units import bytes_text, seconds_text, signed_bytes, signed_seconds

if TYPE_CHECKING:
    from autopar.explain import Report

ASSUMPTIONS = (
    "times come from the cluster description alone; nothing was measured here",
    "communication and compute are added up; memory is the tensors alive, without fragmentation",
    "outputs beside the loss are dropped before backward; without a loss all are held",
)
JOINED = "attention that the model writes out runs as one op, which keeps no scores"
WIDTH = 100
MOST_PARAMETERS = 3
MOST_COLLECTIVES = 2
WORTH_NAMING = 0.0005  # of a step
_RANKS = re.compile(r"\d+ ranks(, )?")
_MODEL = "other layouts and alternatives: plan.explain(model, ...) or `autopar explain FILE --again`"


def lines(report: Report) -> list[str]:
    """The whole report."""
    plan = report.plan
    return [
        headline(plan),
        *_layout_lines(plan),
        "",
        *_figure_lines(report),
        *_sureness_lines(report),
        "",
        *_parameter_lines(plan),
        "",
        *(_again_lines(report) if report.bench and report.solves else [_MODEL]),
        *_rule_lines(plan),
        *_joined_lines(report.joined_attention),
        *(fitted(f"assumed: {assumption}") for assumption in ASSUMPTIONS),
    ]


def headline(plan: Plan) -> str:
    """The plan in a line."""
    figures = plan.predicted
    return fitted(
        f"plan for {plan.devices} x {plan.cluster.device.name}, global batch {plan.options.global_batch}: "
        f"{seconds_text(figures['step_time_s'])} a step, {figures['tokens_per_s_per_gpu']:.0f} tokens/s per device"
    )


def _layout_lines(plan: Plan) -> list[str]:
    words = {
        "dp": "data parallel: the batch is cut, weights are used whole",
        "cp": "context parallel: sequences are cut, weights are used whole",
        "tp": "tensor parallel: weights are used in parts",
        "none": "no matrix product is cut on this axis",
    }
    found = []
    for axis, (size, role) in enumerate(zip(plan.mesh, plan.roles, strict=True)):
        found.append(f"  axis {axis} of {size} ranks: {words[role]}")
    if not plan.mesh:
        found.append("  one device: nothing is cut")
    layout = plan.layout()
    stored = {0: "whole on every data rank", 2: "cut over the data ranks, gathered once a step"}
    zero = stored.get(layout["zero"], "cut over the data ranks, gathered again in the backward pass")
    if layout["dp"] > 1:
        found.append(f"  parameters are stored {zero} (ZeRO stage {layout['zero']})")
    if layout["sp"]:
        found.append("  between tensor parallel blocks the sequence is cut (Megatron sequence parallelism)")
    again = sum(d.recompute for d in plan.decisions.nodes.values())
    found.append(f"  {again} of {len(plan.decisions.nodes)} ops run again in the backward pass to save memory")
    if plan.decisions.offloaded:
        found.append(
            f"  {len(plan.decisions.offloaded)} activations, {bytes_text(plan.predicted['breakdown']['host_bytes'])} a "
            "rank, wait for the backward pass on the host to save memory"
        )
    proven = "optimal" if plan.status == "optimal" else "best found in time"
    found.append(f"  {proven}: no plan in this search space is more than {plan.gap:.2%} faster (proven bound)")
    if plan.options.pin:
        found.append(fitted(f"  pinned by you: {dict(plan.options.pin)}"))
    return found


# -- figures ------------------------------------------------------------------------------


def _figure_lines(report: Report) -> list[str]:
    columns = [_time_column(report.plan), _memory_column(report.plan)]
    if report.bench is not None:
        columns.insert(1, _resource_column(report))
    widths = [max(len(line) for line in column) + 2 for column in columns]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _time_column(plan: Plan) -> list[str]:
    figures = plan.predicted
    parts, total = figures["breakdown"], figures["step_time_s"] or 1.0
    found = [f"time, MFU {figures['mfu']:.1%}"]
    for key, name in (
        ("forward_s", "forward"),
        ("backward_s", "backward"),
        ("recompute_s", "recomputation"),
        ("optimizer_s", "optimizer"),
        ("communication_s", "communication"),
        ("offload_s", "to host and back"),
    ):
        if parts.get(key):
            found.append(f"  {name:<13} {seconds_text(parts[key]):>10} {parts[key] / total:6.1%}")
    by_kind = sorted(parts["communication_by_kind_s"].items(), key=lambda item: -item[1])
    for kind, seconds in by_kind[:MOST_COLLECTIVES]:
        if seconds:
            found.append(f"   {kind.replace(' on axis ', ', axis '):<22} {seconds_text(seconds):>10}")
    return found


def _resource_column(report: Report) -> list[str]:
    total = report.plan.predicted["step_time_s"] or 1.0
    parts = {_RANKS.sub("", name).replace(" ()", ""): s for name, s in report.attribution.by_resource.items()}
    width = max((len(name) for name in parts), default=0)
    return ["it waits for", *(f"  {name:<{width}} {seconds / total:6.1%}" for name, seconds in parts.items())]


def _memory_column(plan: Plan) -> list[str]:
    figures, limit = plan.predicted, plan.options.memory_limit_bytes
    found = [f"peak {bytes_text(figures['peak_bytes'])} of {bytes_text(limit)}"]
    for name, nbytes in figures["breakdown"]["memory_bytes"].items():
        if nbytes:
            found.append(f"  {name:<13} {bytes_text(nbytes):>11}")
    return [*found, f"  in the {figures['breakdown']['peak_at']}"[:28]]


def _sureness_lines(report: Report) -> list[str]:
    """How far off the figures may be, and what would make them better."""
    plan, figures = report.plan, report.plan.predicted
    bars = error_bars(plan.cluster, figures["step_time_s"], figures["peak_bytes"])
    found = [error_bar_line(bars)]
    if report.bench is not None:
        found.append(faster_line(report.faster))
    return found


def error_bar_line(bars: Mapping[str, Any] | None) -> str:
    """The interval in which measured runs would lie."""
    if bars is None or bars["step_time_s"] is None:
        return "error bar: none, as no published run was measured on such a cluster"
    low, high = (seconds_text(s) for s in bars["step_time_s"])
    return fitted(
        f"error bar: {low} to {high}, by {bars['share']:.0%} of {bars['runs']} runs on this device, {bars['where']}"
    )


def faster_line(faster: Iterable[Faster]) -> str:
    """What a part of the cluster is worth."""
    shares = {f.what: f.extra_s / f.before_s if f.before_s else 0.0 for f in faster}
    parts = [f"{what} {share:+.1%}" for what, share in shares.items() if share <= -WORTH_NAMING] or ["as it is"]
    return fitted(f"with a part 10% faster, the step: {', '.join(parts)}")


# -- parameters -----------------------------------------------------------------------------


def parameter_table(plan: Plan) -> list[dict[str, Any]]:
    """Per pattern of names and stored placement: how many parameters."""
    groups: dict[tuple[str, State], list[str]] = {}
    for fqn, state in plan.decisions.params.items():
        groups.setdefault((folded(fqn), state), []).append(fqn)
    return [{"parameters": name, "count": len(names), "placement": list(s)} for (name, s), names in groups.items()]


def _parameter_lines(plan: Plan) -> list[str]:
    cut = Counter(any(shard_dim(p) is not None for p in s) for s in plan.decisions.params.values())
    found = [f"parameters as stored, per mesh axis: {cut[True]} cut, {cut[False]} whole on every rank"]
    by_state: dict[str, list[str]] = {}
    for row in parameter_table(plan):
        by_state.setdefault(", ".join(row["placement"]) or "whole", []).append(row["parameters"])
    for state, names in list(by_state.items())[:MOST_PARAMETERS]:
        found.append(fitted(f"  {state:<12} {', '.join(_short(names))}"))
    if len(by_state) > MOST_PARAMETERS:
        found.append(f"  and {len(by_state) - MOST_PARAMETERS} more placements: see report.to_dict()")
    return found


def _short(names: list[str]) -> list[str]:
    """Names in repeated layers without the way there, and all without ".weight"."""
    return [name.rpartition("*.")[2].removesuffix(".weight") for name in names]


def fitted(line: str, width: int = WIDTH) -> str:
    """A line of at most `width` characters."""
    return line if len(line) <= width else line[: width - 4].rstrip() + " ..."


# -- what was solved again --------------------------------------------------------------------


def _again_lines(report: Report) -> list[str]:
    return [
        *_alternative_lines(report),
        *map(fitted, report.memory_price.lines()),
        *_baseline_lines(report),
    ]


def _alternative_lines(report: Report) -> list[str]:
    found = ["each decision | its next best, solved again with the choice forbidden: seconds and bytes more"]
    for alternative in report.alternatives:
        found.append(_row(alternative))
    left = len(report.decisions) - len(report.alternatives)
    if left:
        found.append(f"  {left} more in report.decisions; report.next_best(NAME) solves one again")
    return found


def _row(alternative: Alternative) -> str:
    start = f"  {fitted(short_title(alternative.decision), 38):<38} {fitted(alternative.chosen, 12)}"
    if alternative.plan is None:
        needed = alternative.needed_bytes
        return fitted(f"{start}; {alternative.verdict() if needed is None else f'no other fits: {bytes_text(needed)}'}")
    extra_s, extra_bytes = alternative.extra_s or 0.0, alternative.extra_bytes or 0
    seconds = "as fast" if alternative.as_fast else signed_seconds(extra_s)
    known = "" if alternative.proven else f" gap {alternative.plan.gap:.0%}"
    known += "; some not asked" if alternative.reason else ""
    choice = f"{start} | {fitted(alternative.instead, 12)}"
    return fitted(f"{choice:<69} {seconds:>11} {signed_bytes(extra_bytes):>11}{known}")


def short_title(decision: str) -> str:
    """ "storage of mlp.up_proj" of "storage of model.layers.*.mlp.up_proj.weight"."""
    kind, of, name = decision.partition(" of ")
    return f"{kind}{of}{_short([name])[0]}" if of else decision


def _baseline_lines(report: Report) -> list[str]:
    if not report.baselines:
        return ["one device: there are no other layouts"]
    found = ["the usual layouts, priced the same way"]
    ours = report.plan.predicted["step_time_s"]
    for row in report.baselines:
        if row.step_time_s is None:
            found.append(fitted(f"  {row.name:<34}{row.reason}"))
        else:
            ratio = row.step_time_s / ours if ours else math.inf
            time, memory = seconds_text(row.step_time_s), bytes_text(row.peak_bytes or 0)
            found.append(f"  {row.name:<38} {time:>11} {ratio:7.2f} x {memory:>12}")
    return found


def _rule_lines(plan: Plan) -> list[str]:
    if not plan.unruled:
        return []
    names = ", ".join(plan.unruled[:6]) + (" ..." if len(plan.unruled) > 6 else "")
    return [fitted(f"{len(plan.unruled)} ops ran replicated for want of a rule: {names}")]


def _joined_lines(count: int | None) -> list[str]:
    if not count:
        return []
    return [f"{JOINED}: {count} times"]
