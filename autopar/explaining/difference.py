"""Two plans of one model, side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autopar.dataflow import module_path
from autopar.errors import PlanMismatch
from autopar.explaining.attribution import folded
from autopar.placements import State
from autopar.plans import Plan
from autopar.units import bytes_text, seconds_text, signed_bytes, signed_seconds

_FIGURES = ("step_time_s", "peak_bytes", "tokens_per_s_per_gpu", "mfu", "hfu", "fits")
_PARTS = ("forward_s", "backward_s", "recompute_s", "communication_s", "offload_s", "optimizer_s")


@dataclass(frozen=True)
class StorageChange:
    """Parameters that the plans store differently: a pattern of names, how many, and both placements in words."""

    parameters: str
    count: int
    first: str
    second: str


@dataclass(frozen=True)
class PlanDifference:
    """What differs between a first and a second plan. Each entry is (first, second).

    settings: of what was asked for: devices, cluster, memory limit, optimizer, pins.
    layout: mesh, axes and layout keys. figures: predictions, parts of the step time and kinds of collectives.
    storage: per pattern of parameters; on different meshes the same placement is another storage.
    recomputed: ops that run again in one plan only: by module pattern where the trace is at hand, else by kind of op.
    """

    settings: Mapping[str, tuple[Any, Any]]
    layout: Mapping[str, tuple[Any, Any]]
    figures: Mapping[str, tuple[Any, Any]]
    storage: tuple[StorageChange, ...]
    recomputed: tuple[Mapping[str, int], Mapping[str, int]]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.settings or self.layout or self.figures or self.storage or any(self.recomputed))

    def to_dict(self) -> dict[str, Any]:
        """The difference as data."""

        def pairs(entries: Mapping[str, tuple[Any, Any]]) -> dict[str, list[Any]]:
            return {name: list(pair) for name, pair in entries.items()}

        return {
            "settings": pairs(self.settings),
            "layout": pairs(self.layout),
            "figures": pairs(self.figures),
            "storage": [dict(change.__dict__) for change in self.storage],
            "recomputed_only_in_first": dict(self.recomputed[0]),
            "recomputed_only_in_second": dict(self.recomputed[1]),
        }

    def __str__(self) -> str:
        if self.same:
            return "the plans are the same"
        lines: list[str] = []
        for title, entries in (("asked for", self.settings), ("layout", self.layout)):
            if entries:
                lines.append(title)
                lines += [f"  {name:<22} {_text(a)} -> {_text(b)}" for name, (a, b) in entries.items()]
        if self.storage:
            lines.append("parameters as stored")
            width = max(len(c.parameters) for c in self.storage)
            lines += [f"  {c.parameters:<{width}} {c.count:>4} x  {c.first} -> {c.second}" for c in self.storage]
        for which, ops in zip(("first", "second"), self.recomputed, strict=True):
            if ops:
                named = ", ".join(f"{count} x {name}" for name, count in list(ops.items())[:8])
                more = f" and {len(ops) - 8} more" if len(ops) > 8 else ""
                lines.append(f"run again only in the {which}: {named}{more}")
        if self.figures:
            lines.append("predicted")
            lines += [_figure_line(name, a, b) for name, (a, b) in self.figures.items()]
        return "\n".join(lines)


def difference(first: Plan, second: Plan) -> PlanDifference:
    """Compare two plans; raises PlanMismatch unless they are for the same model and batch."""
    if first.graph_hash != second.graph_hash:
        raise PlanMismatch(
            "the plans are for different models, batches or torch versions (their traced graphs differ), so their "
            f"decisions cannot be compared: {_what(first)} and {_what(second)}"
        )
    return PlanDifference(
        settings=_changed(_settings(first), _settings(second)),
        layout=_changed(_layout(first), _layout(second)),
        figures=_changed(_figures(first), _figures(second)),
        storage=tuple(_storage(first, second)),
        recomputed=_recomputed(first, second),
    )


def _what(plan: Plan) -> str:
    inputs = ", ".join(f"{i.path} {list(i.shape)}" for i in plan.inputs[:3])
    return f"{plan.options.model or 'a model'} with {len(plan.decisions.params)} parameters on {inputs}"


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def _settings(plan: Plan) -> dict[str, Any]:
    options = {k: v for k, v in plan.options.__dict__.items() if k not in ("pin", "model")}
    pins = {f"pin {key}": value for key, value in plan.options.pin.items()}
    return {"cluster": plan.cluster.name, "devices": plan.devices, **options, **pins}


def _layout(plan: Plan) -> dict[str, Any]:
    return {"mesh": list(plan.mesh), "axes": list(plan.roles), **plan.layout_keys}


def _figures(plan: Plan) -> dict[str, Any]:
    parts = plan.predicted["breakdown"]
    by_kind = {f"{kind}, s": seconds for kind, seconds in parts["communication_by_kind_s"].items()}
    memory = {f"{name}, bytes": nbytes for name, nbytes in parts["memory_bytes"].items()}
    figures = {name: plan.predicted[name] for name in _FIGURES}
    return {**figures, **{name: parts.get(name, 0.0) for name in _PARTS}, **by_kind, **memory, "gap": plan.gap}


def _storage(first: Plan, second: Plan) -> list[StorageChange]:
    groups: Counter[tuple[str, str, str]] = Counter()
    for fqn, state in first.decisions.params.items():
        other = second.decisions.params[fqn]
        if state != other or (first.mesh != second.mesh and set(state) | set(other) != {"R"}):
            groups[folded(fqn), _state(state, first), _state(other, second)] += 1
    return [StorageChange(name, count, a, b) for (name, a, b), count in groups.items()]


def _state(state: State, plan: Plan) -> str:
    """ "S(0) of 8, R of 2": with the sizes of the axes, as the meshes may differ; "whole" where nothing is cut."""
    if all(p == "R" for p in state):
        return "whole"
    return ", ".join(f"{p} of {size}" for p, size in zip(state, plan.mesh, strict=True))


def _recomputed(first: Plan, second: Plan) -> tuple[Mapping[str, int], Mapping[str, int]]:
    again = [{n for n, d in plan.decisions.nodes.items() if d.recompute} for plan in (first, second)]
    where = _places(first, second)
    only = (again[0] - again[1], again[1] - again[0])
    counted = [Counter(where.get(name) or _kind(name) for name in sorted(names)) for names in only]
    return dict(counted[0].most_common()), dict(counted[1].most_common())


def _places(first: Plan, second: Plan) -> dict[str, str]:
    """Where in the model each op comes from, if one of the plans still has its trace."""
    bench = first.bench or second.bench
    if bench is None:
        return {}
    return {n.name: folded(module_path(n)) for n in bench.trace.graph_module.graph.nodes}


def _kind(name: str) -> str:
    """The kind of op that a node's name tells: "mm" of "mm_3"."""
    return re.sub(r"_\d+$", "", name)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value)) or "1"
    return "-" if value is None else str(value)


def _figure_line(name: str, a: Any, b: Any) -> str:
    if isinstance(a, bool) or isinstance(b, bool):
        return f"  {name:<34} {a} -> {b}"
    a, b = a or 0.0, b or 0.0
    share = f"{(b - a) / a:+.1%}" if a else ""
    if name.endswith(("_s", ", s")):
        label = name.removesuffix("_s").removesuffix(", s")
        before, after, change = seconds_text(a), seconds_text(b), signed_seconds(b - a)
    elif name.endswith("bytes"):
        label = name.removesuffix("_bytes").removesuffix(", bytes")
        before, after, change = bytes_text(a), bytes_text(b), signed_bytes(b - a)
    else:
        label, before, after, change = name, f"{a:.4g}", f"{b:.4g}", ""
    return f"  {label.replace('_', ' '):<34} {before:>12} -> {after:>12}  {change:>12} {share:>8}".rstrip()
