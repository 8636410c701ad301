"""Why a plan by degrees is what it is. What takes choosing again is chosen when it is first asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from autopar.choosing import report_text as text
from autopar.choosing.page_data import page_data
from autopar.choosing.plan import choose, staged_plan
from autopar.errors import AutoparError, Infeasible, LayoutError
from autopar.explaining.alternatives import Alternative
from autopar.explaining.faster import faster_clusters
from autopar.layout_reading import written
from autopar.layouts import KEYS
from autopar.predicting.predict import Predictor
from autopar.staged import TO_RUN, StagedPlan
from autopar.tracing.written_attention import joined_attention

DEFAULT_REPORT_S = 20.0  # for all that a printed report chooses again
MORE_BYTES = 1 << 30
MEMORY = "1 GiB more memory a device"
USUAL = ({"pp": 1, "cp": 1}, {"tp": 1}, {"sp": False}, {"zero": 0}, {"schedule": "1f1b"}, {"recompute": "none"})


@dataclass(frozen=True)
class Worth:
    """What more of a resource would bring: the best layout with it."""

    what: str
    step_time_s: float
    saves_s: float
    layout: Mapping[str, Any]

    @property
    def of_memory(self) -> bool:
        """Whether it is memory that there is more of."""
        return self.what == MEMORY


@dataclass(frozen=True)
class LayoutReport:
    """Print it, or take `to_dict()`, or write `to_html(path)`.

    predictor: what it takes to choose again; None for a plan that was loaded without its model.
    time_limit_s: for what a printed report or `to_dict` chooses again.
    """

    plan: StagedPlan
    predictor: Predictor | None = None
    time_limit_s: float = DEFAULT_REPORT_S

    def __str__(self) -> str:
        return "\n".join(text.lines(self))

    @property
    def joins_attention(self) -> bool:
        """Whether the model, where it is known, writes out attention that runs as one op."""
        return self.predictor is not None and joined_attention(self.predictor.sample.trace.graph_module.graph) > 0

    def why_not(self, pin: Mapping[str, Any], *, time_limit_s: float = DEFAULT_REPORT_S) -> Alternative:
        """The best layout with `pin` fixed besides, and how it differs, in seconds and bytes."""
        unknown = [key for key in pin if key not in KEYS]
        if unknown or not pin:
            raise AutoparError(f"why_not needs layout keys, such as {{'tp': 8}}; they are {', '.join(KEYS)}")
        predictor, began = self._predictor("why_not"), time.perf_counter()
        condition = " and ".join(f"{key}={written(value)}" for key, value in pin.items())
        base = Alternative("layout", str(self.plan.named), condition, self.plan, "solved")
        merged = {**{k: v for k, v in self.plan.options.pin.items() if k in KEYS}, **pin}
        try:
            choice = choose(predictor, merged, time_limit_s)
        except Infeasible as error:
            outcome = "does not fit" if error.needed_bytes else "impossible"
            return replace(base, outcome=outcome, reason=str(error), needed_bytes=error.needed_bytes)
        except LayoutError as error:
            return replace(base, outcome="impossible", reason=str(error))
        made = staged_plan(predictor, choice, replace(self.plan.options, pin=merged))
        return replace(base, plan=made, instead=str(made.named), solve_s=time.perf_counter() - began)

    @cached_property
    def alternatives(self) -> tuple[Alternative, ...]:
        """What people ask first: without a pipeline, without tensor ranks, and so on, where the plan has them."""
        chosen, deadline = self.plan.layout(), time.perf_counter() + self.time_limit_s / 2
        found = []
        for pin in USUAL:
            left, open_to_us = deadline - time.perf_counter(), not set(pin) & set(self.plan.options.pin)
            if left > 0 and open_to_us and any(chosen[key] != value for key, value in pin.items()):
                found.append(self.why_not(pin, time_limit_s=left))
        return tuple(found)

    @cached_property
    def worths(self) -> tuple[Worth, ...]:
        """What binds: the best layout with a little more of each resource."""
        predictor, deadline = self._predictor("worths"), time.perf_counter() + self.time_limit_s / 2
        asked = [(MEMORY, _with_memory(predictor, MORE_BYTES))]
        for what, cluster in faster_clusters(self.plan.cluster):
            other = predictor.on(cluster)
            other.forget_prices()
            asked.append((f"{what} 10% faster", other))
        found = []
        for what, other in asked:
            try:
                best = choose(other, self._pins(), deadline - time.perf_counter()).best
            except Infeasible:  # in the time that was left: more of anything always fits
                break
            saved = self.plan.objective_s - best.step_time_s
            found.append(Worth(what, best.step_time_s, saved, best.layout.to_dict()))
        return tuple(found)

    def _pins(self) -> dict[str, Any]:
        return {k: v for k, v in self.plan.options.pin.items() if k in KEYS}

    def _predictor(self, what: str) -> Predictor:
        if self.predictor is None:
            raise AutoparError(
                f"{what} chooses again, and this plan was loaded without its model: use plan.explain(model), or on "
                "the command line `autopar explain plan.json --why-not tp=8`"
            )
        return self.predictor

    # -- the whole -----------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything the text says, as data."""
        plan, known = self.plan, self.predictor is not None
        return {
            "cluster": plan.cluster.name,
            "devices": plan.devices,
            "devices_used": plan.named.devices,
            "mesh": list(plan.mesh),
            "axes": list(plan.roles),
            "precision": plan.options.precision,
            "layout": plan.layout(),
            "stages": {"blocks": list(plan.blocks), "micro_batches": plan.micro_batches},
            **plan.predicted,
            "memory_limit_bytes": plan.options.memory_limit_bytes,
            "solver": {
                "status": plan.status, "objective_s": plan.objective_s, "bound_s": plan.bound_s, "gap": plan.gap,
                **plan.counts,
            },
            "parameters": {fqn: list(state) for fqn, state in plan.decisions.params.items()},
            "others": [{**o.__dict__, "layout": dict(o.layout)} for o in plan.others],
            "alternatives": [a.to_dict() for a in self.alternatives] if known else None,
            "worths": [{**w.__dict__, "layout": dict(w.layout)} for w in self.worths] if known else None,
            "pins": dict(plan.options.pin),
            "runs": plan.not_yet or TO_RUN,
            "headline": text.headline(plan),
            **page_data(self),
            "assumptions": list(text.ASSUMPTIONS),
        }  # fmt: skip

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained page."""
        from autopar.explaining.page.write import write_page  # late, as it brings the template engine

        write_page(path, self.to_dict())


def _with_memory(predictor: Predictor, more_bytes: int) -> Predictor:
    made = predictor.on(predictor.cluster)
    made.limit_bytes = predictor.limit_bytes + more_bytes
    return made
