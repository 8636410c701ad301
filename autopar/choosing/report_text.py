"""A report on a plan by degrees, on one screen."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import TYPE_CHECKING

from autopar.explaining.text import JOINED
from autopar.layout_reading import written
from autopar.layout_text import short
from autopar.layouts import Layout
from autopar.staged import TO_RUN, StagedPlan
from autopar.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from autopar.choosing.report import LayoutReport

WIDTH = 120
MOST_OTHERS = 5
ASSUMPTIONS = (
    "times and bytes come from the cluster description and the trace alone; benchmarks/published.py says how far such "
    "predictions were from measured runs",
    "all ranks are equally fast, and nobody else uses the network",
)
_MODEL = "why not something else, and what binds: plan.explain(model) or `autopar explain FILE --again`"
_PARTS = {
    "forward_s": "forward", "backward_s": "backward", "recompute_s": "recomputation",
    "tensor_messages_s": "tensor-parallel messages", "expert_messages_s": "exchanges with experts",
    "bubble_s": "pipeline bubble", "send_s": "sends between stages",
    "gradients_s": "gradients' reduction", "gathers_s": "parameters' gathers", "optimizer_s": "optimizer",
}  # fmt: skip


def lines(report: LayoutReport) -> list[str]:
    """The whole report."""
    plan = report.plan
    return [
        headline(plan),
        *_layout_lines(plan),
        "",
        *_figure_lines(plan),
        *([JOINED] if report.joins_attention else []),
        "",
        *_other_lines(plan),
        "",
        *(_again_lines(report) if report.predictor is not None else [_MODEL]),
        "",
        *_wrapped("to run it", plan.not_yet or TO_RUN),
        *(line for a in ASSUMPTIONS for line in _wrapped("assumed", a)),
    ]


def headline(plan: StagedPlan) -> str:
    """The plan in a line."""
    figures = plan.predicted
    return (
        f"plan for {plan.devices} x {plan.cluster.device.name}, batch {plan.options.global_batch}: "
        f"{seconds_text(figures['step_time_s'])} a step, {figures['tokens_per_s_per_gpu']:,.0f} tokens/s per device, "
        f"MFU {figures['mfu']:.1%}"
    )


def loaded(layout: Layout) -> str:
    """How evenly experts are taken to be loaded, and who says so."""
    share, load = layout.busiest_share, layout.expert_load
    if isinstance(load, tuple):
        return f"the busiest has {share:.3g} times its share by the given rows of {len(load)} experts"
    return "taken to be loaded alike" if share == 1 else f"the busiest has {share:.3g} times its share, as given"


def _layout_lines(plan: StagedPlan) -> list[str]:
    layout, keys = plan.named, plan.named.to_dict()
    counts = ", ".join(f"{len(list(same))} x {n}" for n, same in groupby(plan.blocks))
    words = [
        (
            "pipeline",
            layout.pp,
            f"{layout.schedule}, {plan.micro_batches} micro-batches; blocks on its ranks: {counts}",
        ),
        ("stages on each", layout.vpp, "interleaved"),
        ("data", keys["dp"], _stored(layout)),
        ("context", keys["cp"], "the sequence is cut, attention too"),
        ("experts", layout.ep, f"spread over so many of the data ranks; {loaded(layout)}"),
        ("tensor", keys["tp"], "weights are used in parts" + (", the sequence cut between" if layout.sp else "")),
    ]
    found = [line for name, degree, what in words if degree != 1 for line in _degree_lines(name, degree, what)]
    found.append(f"  {'micro-batch':<15}{layout.micro_batch:>6}  {_again(layout)}")
    idle = plan.devices - layout.devices
    if idle:
        found.append(f"  {'idle devices':<15}{idle:>6}  no layout that uses them is faster")
    return [*found, *_proof(plan)]


def _degree_lines(name: str, degree: int | list[int], what: str) -> list[str]:
    """degree: or that of each stage."""
    lead = f"  {name:<15}{written(degree):>6}  "
    return textwrap.wrap(what, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead), break_on_hyphens=False)


def _stored(layout: Layout) -> str:
    parts = ("nothing", "optimizer state", "optimizer state and gradients", "optimizer state, gradients and parameters")
    return f"replicas; {parts[layout.zero]} in parts (ZeRO stage {layout.zero})"


def _again(layout: Layout) -> str:
    where = "; the optimizer's state waits on the host" if layout.offload == "optimizer" else ""
    return _runs_again(layout) + where


def _runs_again(layout: Layout) -> str:
    if layout.recompute == "none":
        return "nothing runs again in the backward pass"
    if layout.recompute == "selective":
        return "the core of attention runs again in the backward pass"
    count = "every block" if layout.recompute_blocks is None else f"{layout.recompute_blocks} blocks of each rank"
    return f"{count} run{'s' if layout.recompute_blocks is None else ''} again in the backward pass"


def _proof(plan: StagedPlan) -> list[str]:
    counts = plan.counts
    proven = "optimal" if plan.status == "optimal" else "best found in time"
    pins = [f"  pinned by you: {dict(plan.options.pin)}"] if plan.options.pin else []
    looked = (
        f"of {counts.get('cells', 0):,} sets of degrees {counts.get('visited', 0):,} had to be looked into, "
        f"{counts.get('priced', 0):,} layouts priced"
    )
    return [*_wrapped(f"  {proven}", f"no layout is more than {plan.gap:.2%} faster (proven: {looked})"), *pins]


def _figure_lines(plan: StagedPlan) -> list[str]:
    figures, parts = plan.predicted, plan.predicted["breakdown"]
    step = figures["step_time_s"]
    shown = sorted(((parts.get(k, 0.0), name) for k, name in _PARTS.items()), reverse=True)
    where = ", ".join(f"{name} {seconds_text(s)} ({s / step:.0%})" for s, name in shown if s > 0)
    held = sorted(((v, k) for k, v in parts["memory_bytes"].items()), reverse=True)
    memory = ", ".join(f"{name} {bytes_text(n)}" for n, name in held if n)
    limit = plan.options.memory_limit_bytes
    return [
        *_wrapped("where time goes", where),
        *_wrapped(
            "memory", f"{bytes_text(figures['peak_bytes'])} of {bytes_text(limit)} on the fullest device: {memory}"
        ),
    ]


def _other_lines(plan: StagedPlan) -> list[str]:
    if not plan.others:
        return ["no other degrees were found that fit"]
    found = ["the best layouts on other degrees:"]
    for other in plan.others[:MOST_OTHERS]:
        more = other.step_time_s / plan.objective_s - 1
        lead = f"  {seconds_text(other.step_time_s):>10} {more:>+7.1%} {bytes_text(other.peak_bytes):>11}  "
        layout = short(Layout(**other.layout)).replace(",", ", ")
        found += textwrap.wrap(layout, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead))
    return found


def _again_lines(report: LayoutReport) -> list[str]:
    found = ["why not:"] if report.alternatives else []
    for other in report.alternatives:
        instead = f"  ({short(Layout(**other.plan.layout()))})" if other.plan is not None else ""
        found += textwrap.wrap(f"{other.condition}: {other.verdict()}{instead}", WIDTH - 2, initial_indent="  ",
                               subsequent_indent="      ", break_on_hyphens=False)  # fmt: skip
    worths = [f"{w.what} {w.saves_s / report.plan.objective_s:+.2%}" for w in report.worths]
    return [*found, *_wrapped("what binds", "time saved by " + "; ".join(worths))] if worths else found


def _wrapped(name: str, what: str) -> list[str]:
    return textwrap.wrap(f"{name}: {what}", WIDTH, subsequent_indent="    ", break_on_hyphens=False)
