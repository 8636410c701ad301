"""Writes docs/compatibility.md by planning every family of tests/families.py: `make docs`.

tests/test_compatibility.py fails when a row is no longer true. Figures are shares of predicted time on a
described cluster, so they are the same on every machine.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `tests`, where the families are

import autopar
from autopar.cost.model import CostModel
from autopar.dataflow import Dataflow, result_metas
from autopar.opcost import op_seconds, work_share
from autopar.trace import Trace, trace
from tests.families import FAMILIES, NAMED, REMARKS

PAGE = Path(__file__).parent / "compatibility.md"
DEVICES = 8
TIME_LIMIT_S = 120.0

_HEAD = f"""\
# Compatibility

Made by `make docs` from `tests/families.py`; do not edit.

Every family below is captured, planned and run as it is, at tiny size with random weights: forward, backward and
optimizer. `tests/parity/test_families.py` compares each, in float64, with the model on one device: the loss, all
gradients, parameters and updated buffers after five AdamW steps, to nine digits, on meshes of 2, 4, 2x2 and 2x4
ranks, with a free plan, a pinned parameter and mixed shards.

Columns, for the plan on one axis of {DEVICES} devices:

- **in parts**: the share of the model's time on one device that is spent in ops of which each rank does a part.
- **no rule**: ops that autopar has no rule for. They run whole on every rank, which is always correct.
- **cost**: by how much the step would be shorter if each rank did its {DEVICES}th of them.

Devices are slow and their links fast here, so that cutting a tiny model pays at all.
"""


@dataclass(frozen=True)
class Row:
    """What is known of one family; shares from 0 to 1."""

    name: str
    in_parts: float
    unruled: tuple[str, ...]
    cost: float
    remark: str

    def __str__(self) -> str:
        unruled = ", ".join(f"`{op}` x {n}" if n > 1 else f"`{op}`" for op, n in Counter(self.unruled).items())
        cells = (self.name, f"{self.in_parts:.1%}", unruled or "none", f"{self.cost:.1%}", self.remark)
        return f"| {' | '.join(cells)} |".replace("  ", " ")


def cluster(devices: int = DEVICES) -> autopar.ClusterSpec:
    """Slow devices with fast links between them."""
    spec = autopar.ClusterSpec.preset("h100-sxm", gpus=devices)
    rates = (("float32", 1e10), ("float64", 1e10))
    device = replace(
        spec.device, peak_flops_per_s=rates, memory_bytes_per_s=1e10, launch_overhead_s=1e-9, matmul_ramp_s=0.0
    )
    links = tuple(replace(link, latency_s=1e-9) for link in spec.links)
    return replace(spec, device=device, links=links, collective_launch_s=1e-9)


def row(name: str) -> Row:
    """Capture and plan one family."""
    model, call = FAMILIES[name]()
    plan = autopar.plan(model, cluster(), example_inputs=call, pin={"mesh": [DEVICES]}, time_limit_s=TIME_LIMIT_S)
    traced = trace(model, call)
    seconds = whole_seconds(traced)
    cut = [n for n in seconds if work_share(plan.decisions.nodes[n].rules, plan.mesh) < 1]
    wasted = sum(seconds[n] for n in plan.unruled) * (1 - 1 / DEVICES)
    ops = {n.name: str(n.target).split(".")[1] for n in traced.graph_module.graph.nodes if n.name in plan.unruled}
    return Row(
        name,
        sum(seconds[n] for n in cut) / sum(seconds.values()),
        tuple(sorted(ops.values())),
        wasted / plan.objective_s,
        REMARKS.get(name, ""),
    )


def whole_seconds(traced: Trace) -> dict[str, float]:
    """Predicted seconds of every op on one device."""
    costs, flow = CostModel(cluster(1), ()), Dataflow(traced.graph_module.graph)
    found = {}
    for node in flow.ops:
        operands = flow.operands_of[node]
        made = [None if t is None else () for t in result_metas(node)]
        found[node.name] = op_seconds(costs, node, operands, (), [()] * len(operands), made)
    return found


def render(rows: dict[str, Row]) -> str:
    """The page."""
    head = "| family | in parts | no rule | cost | remarks |\n| --- | --- | --- | --- | --- |"
    named = [str(rows[name]) for name in FAMILIES if name in NAMED]
    others = [str(rows[name]) for name in FAMILIES if name not in NAMED]
    parts = [_HEAD, "## Promised", "", head, *named, "", "## Others that are tested alike", "", head, *others, ""]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render({name: row(name) for name in FAMILIES}), encoding="utf-8")
    print(f"Written: {PAGE}")
