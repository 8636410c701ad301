"""The report of a plan: what was chosen, why not something else, what would happen if.

Printing it, `to_dict` and `to_html` say the same. What takes solving again is solved when it is first asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from autopar.baselines import Baseline, baselines
from autopar.cluster import ClusterSpec
from autopar.errors import AutoparError
from autopar.explaining import next_best as nb
from autopar.explaining import text
from autopar.explaining.alternatives import Alternative, why_not
from autopar.explaining.attribution import Attribution
from autopar.explaining.degrees import axis_table
from autopar.explaining.faster import Faster, priced_again
from autopar.explaining.measured import error_bars
from autopar.explaining.memory_price import MemoryPrice, memory_price
from autopar.explaining.shardings import Sharding, parameter_shardings, value_shardings
from autopar.explaining.spans import TimeLine
from autopar.explaining.step_line import step_line
from autopar.explaining.workbench import DEFAULT_AGAIN_S, Workbench
from autopar.plans import Plan
from autopar.tracing.written_attention import joined_attention

DEFAULT_REPORT_S = 20.0  # for all that a printed report solves again; the usual layouts not counted


@dataclass(frozen=True)
class Report:
    """Why a plan is what it is. Print it, or take `to_dict()`, or write `to_html(path)`.

    bench: what it takes to solve again; None for a plan that was loaded without its model.
    time_limit_s: for the alternatives that a printed report or `to_dict` solve.
    solves: whether they solve any; questions are answered either way.
    """

    plan: Plan
    bench: Workbench | None = None
    time_limit_s: float = DEFAULT_REPORT_S
    solves: bool = True

    def __str__(self) -> str:
        return "\n".join(text.lines(self))

    # -- questions -----------------------------------------------------------------

    def why_not(self, pin: Mapping[str, Any], *, time_limit_s: float = DEFAULT_AGAIN_S) -> Alternative:
        """The plan solved again with `pin` fixed (as in `autopar.plan`), and how it differs, in seconds and bytes."""
        if not pin:
            raise AutoparError('why_not needs a pin, such as {"tp": 8} or {"layers.*.mlp": "recompute"}')
        return why_not(self._bench("why_not"), self.plan, pin, time_limit_s=time_limit_s)

    def next_best(self, name: str, *, time_limit_s: float = DEFAULT_AGAIN_S) -> tuple[Alternative, ...]:
        """The decisions of that name (see `decisions`), each solved again with what was chosen forbidden."""
        bench, found = self._bench("next_best"), nb.find(self.decisions, name)
        return tuple(nb.next_best(bench, self.plan, d, time_limit_s=time_limit_s / len(found)) for d in found)

    @cached_property
    def decisions(self) -> tuple[nb.Decision, ...]:
        """What `next_best` can be asked about."""
        return nb.decisions(self._bench("decisions"), self.plan)

    @cached_property
    def attribution(self) -> Attribution:
        """Where the time goes: by resource, by kind of cost, by op."""
        return self._bench("attribution").attribution(self.plan)

    @cached_property
    def time_line(self) -> TimeLine:
        """One step, op by op."""
        return step_line(self.attribution)

    @cached_property
    def faster(self) -> tuple[Faster, ...]:
        """What the plan would take with one part of the cluster 10 % faster."""
        bench = self._bench("faster")

        def price_s(cluster: ClusterSpec) -> float:
            return bench.attribution(replace(self.plan, cluster=cluster)).price.step_time_s

        return priced_again(self.plan.cluster, self.plan.objective_s, price_s)

    @cached_property
    def shardings(self) -> tuple[Sharding, ...]:
        """Every distinct parameter; with the model at hand also every distinct value of its layers."""
        if self.bench is None:
            return tuple(parameter_shardings(self.plan, None))
        return (*parameter_shardings(self.plan, self.bench.trace), *value_shardings(self.attribution))

    @cached_property
    def baselines(self) -> tuple[Baseline, ...]:
        """The usual layouts, priced the same way."""
        bench = self._bench("baselines")
        return baselines(bench.trace, bench.settings_of(self.plan.options))

    @cached_property
    def memory_price(self) -> MemoryPrice:
        """Whether memory binds and what one more byte is worth."""
        return memory_price(self._bench("memory_price"), self.plan, time_limit_s=self.time_limit_s / 2)

    @cached_property
    def alternatives(self) -> tuple[Alternative, ...]:
        """The most important decisions against their next best, as many as the time allows."""
        bench, deadline = self._bench("alternatives"), time.perf_counter() + self.time_limit_s
        asked = nb.headline(self.decisions)
        found: list[Alternative] = []
        for index, decision in enumerate(asked):
            left = deadline - time.perf_counter()
            if left <= 0:
                break
            share = left / (len(asked) - index) * 2
            found.append(nb.next_best(bench, self.plan, decision, time_limit_s=min(left, share)))
        return tuple(found)

    @property
    def joined_attention(self) -> int | None:
        """How many times the model writes out attention that runs as one op; None for a plan without its model."""
        return None if self.bench is None else joined_attention(self.bench.trace.graph_module.graph)

    def _bench(self, what: str) -> Workbench:
        if self.bench is None:
            raise AutoparError(
                f"{what} solves again, and this plan was loaded without its model: use plan.explain(model, "
                "example_inputs=...), or on the command line `autopar explain plan.json --why-not tp=8`"
            )
        return self.bench

    # -- the whole -----------------------------------------------------------------

    def to_dict(self, *, every: bool = False) -> dict[str, Any]:
        """Everything the text says, as data. every: all decisions against their next best, however long that takes."""
        plan, cluster = self.plan, self.plan.cluster
        figures = plan.predicted
        return {
            "kind": "plan",
            "headline": text.headline(plan),
            "model": plan.options.model,
            "cluster": cluster.name,
            "device": cluster.device.name,
            "devices": plan.devices,
            "nodes": cluster.nodes,
            "global_batch": plan.options.global_batch,
            "mesh": list(plan.mesh),
            "axes": list(plan.roles),
            "degrees": axis_table(plan),
            "precision": plan.options.precision,
            "optimizer": plan.options.optimizer,
            "layout": plan.layout(),
            **figures,
            "error_bars": error_bars(cluster, figures["step_time_s"], figures["peak_bytes"]),
            "memory_limit_bytes": plan.options.memory_limit_bytes,
            "memory_at_peak": [{"name": "every device", "bytes": dict(figures["breakdown"]["memory_bytes"])}],
            "solver": {
                "status": plan.status,
                "objective_s": plan.objective_s,
                "bound_s": plan.bound_s,
                "gap": plan.gap,
                "meshes": [{**c.__dict__, "mesh": list(c.mesh)} for c in plan.candidates],
            },
            "parameters": text.parameter_table(plan),
            "shardings": [s.to_dict() for s in self.shardings],
            "recomputed_ops": sorted(n for n, d in plan.decisions.nodes.items() if d.recompute),
            "offloaded": sorted(plan.decisions.offloaded),
            **self._priced_again(),
            **self._solved_again(every),
            "replicated_for_want_of_a_rule": list(plan.unruled),
            "joined_attention": self.joined_attention,
            "pins": dict(plan.options.pin),
            "assumptions": list(text.ASSUMPTIONS),
        }

    def _priced_again(self) -> dict[str, Any]:
        """What takes the model, but no solving."""
        if self.bench is None:
            return dict.fromkeys(("resources_s", "time_line", "faster"))
        return {
            "resources_s": self.attribution.by_resource,
            "time_line": self.time_line.to_dict(),
            "faster": [f.to_dict() for f in self.faster],
        }

    def _solved_again(self, every: bool) -> dict[str, Any]:
        if self.bench is None or not self.solves:
            return dict.fromkeys(("baselines", "memory", "next_best"))
        bench = self.bench
        found = [nb.next_best(bench, self.plan, d) for d in self.decisions] if every else self.alternatives
        return {
            "baselines": [b.to_dict() for b in self.baselines],
            "memory": self.memory_price.to_dict(),
            "next_best": [a.to_dict() for a in found],
        }

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained page: no network, light and dark, narrow and wide, on paper."""
        from autopar.explaining.page.write import write_page  # late, as it brings the template engine

        write_page(path, self.to_dict())
