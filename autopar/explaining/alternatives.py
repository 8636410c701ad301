"""What else could have been: another plan for the same model, under one more condition, beside the chosen one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autopar.errors import Infeasible, PinError
from autopar.explaining.workbench import DEFAULT_AGAIN_S, Workbench, with_pins
from autopar.plans import Plan
from autopar.units import bytes_text, seconds_text, signed_bytes, signed_seconds

TOLERANCE = 1e-4  # relative: two step times that differ by less are the same to the solver


@dataclass(frozen=True)
class CostChange:
    """One kind of cost, such as "all_reduce of gradients over 8 ranks", in the chosen plan and in the other."""

    name: str
    chosen_s: float
    other_s: float

    @property
    def extra_s(self) -> float:
        """What the other plan pays more."""
        return self.other_s - self.chosen_s


@dataclass(frozen=True)
class Alternative:
    """One answer: the chosen plan solved again under `condition`.

    plan: the best plan under the condition, None if there is none. Its own status, bound and gap say how well it is
        known: where a time limit stopped the proof, its time is that of the best plan found, never a bound.
    outcome: "solved", "does not fit", "impossible", "pinned by you" or "no time".
    needed_bytes: what the leanest plan found under the condition takes, if it does not fit.
    changes: costs that differ, the largest difference first.
    """

    decision: str
    chosen: str
    condition: str
    baseline: Plan
    outcome: str
    plan: Plan | None = None
    instead: str = ""
    reason: str = ""
    needed_bytes: int | None = None
    changes: tuple[CostChange, ...] = ()
    solve_s: float = 0.0

    @property
    def extra_s(self) -> float | None:
        """Seconds a step that the alternative takes more."""
        return None if self.plan is None else self.plan.objective_s - self.baseline.objective_s

    @property
    def extra_bytes(self) -> int | None:
        """Bytes of peak memory that the alternative takes more; of the leanest plan found, if none fits."""
        theirs = self.needed_bytes if self.plan is None else self.plan.predicted["peak_bytes"]
        return None if theirs is None else theirs - self.baseline.predicted["peak_bytes"]

    @property
    def proven(self) -> bool:
        """Whether nothing better exists under the condition (to the solver's tolerance)."""
        return self.plan is not None and self.plan.status == "optimal"

    @property
    def as_fast(self) -> bool:
        """Whether the step times are the same to the solver's tolerance."""
        return self.extra_s is not None and abs(self.extra_s) <= TOLERANCE * self.baseline.objective_s

    def verdict(self) -> str:
        """The difference in one line."""
        if self.plan is None:
            return f"{self.outcome}: {self.reason}" if self.reason else self.outcome
        assert self.extra_s is not None and self.extra_bytes is not None
        known = "" if self.proven else f" (best found in the time; up to {self.plan.gap:.1%} less is not excluded)"
        memory = f"{signed_bytes(self.extra_bytes)} peak memory"
        if self.as_fast:
            return f"as fast (within {TOLERANCE:.2%}), {memory}{known}"
        share = self.extra_s / self.baseline.objective_s if self.baseline.objective_s else float("inf")
        return f"{signed_seconds(self.extra_s)} a step ({share:+.1%}), {memory}{known}"

    def to_dict(self) -> dict[str, Any]:
        """The answer as data; `step_time_s` and `peak_bytes` are those of a plan that was solved, or None."""
        plan = self.plan
        return {
            "decision": self.decision,
            "chosen": self.chosen,
            "condition": self.condition,
            "instead": self.instead,
            "outcome": self.outcome,
            "reason": self.reason,
            "step_time_s": plan.objective_s if plan else None,
            "peak_bytes": plan.predicted["peak_bytes"] if plan else None,
            "extra_s": self.extra_s,
            "extra_bytes": self.extra_bytes,
            "needed_bytes": self.needed_bytes,
            "status": plan.status if plan else None,
            "bound_s": plan.bound_s if plan else None,
            "gap": plan.gap if plan else None,
            "changes": [{**c.__dict__, "extra_s": c.extra_s} for c in self.changes],
        }

    def __str__(self) -> str:
        lines = [f"why not {self.condition}: {self.verdict()}"]
        if self.plan is None:
            return lines[0]
        ours, theirs = self.baseline, self.plan
        for name, plan in (("chosen", ours), (f"with {self.condition}", theirs)):
            layout = ", ".join(f"{k}={plan.layout_keys.get(k)}" for k in ("dp", "tp", "zero", "sp", "recompute"))
            time_s, peak = seconds_text(plan.objective_s), bytes_text(plan.predicted["peak_bytes"])
            lines.append(f"  {name:<28} mesh {mesh_text(plan.mesh):<8} {time_s:>12}  {peak:>12}  {layout}")
        shown = self.changes[:8]
        lines += ["  what costs differ"] if shown else []
        for change in shown:
            before, after = seconds_text(change.chosen_s), seconds_text(change.other_s)
            lines.append(f"    {change.name:<52} {before:>11} -> {after:>11}  {signed_seconds(change.extra_s):>12}")
        if len(self.changes) > len(shown):
            rest = sum(c.extra_s for c in self.changes[len(shown) :])
            lines.append(f"    {len(self.changes) - len(shown)} more: {signed_seconds(rest)}")
        return "\n".join(lines)


def why_not(
    bench: Workbench, plan: Plan, pin: Mapping[str, Any], *, time_limit_s: float = DEFAULT_AGAIN_S
) -> Alternative:
    """Solve again with `pin` fixed beside what is pinned already."""
    text = pin_text(pin)
    options = with_pins(plan.options, pin)
    return solved_again(
        bench, plan, decision="layout", chosen="", condition=text, options=options, time_limit_s=time_limit_s
    )


def solved_again(
    bench: Workbench,
    plan: Plan,
    *,
    decision: str,
    chosen: str,
    condition: str,
    options: Any = None,
    time_limit_s: float,
    **conditions: Any,
) -> Alternative:
    """The answer to one condition: other options, or other settings of the search."""
    began = time.perf_counter()
    try:
        found = bench.solve(options or plan.options, time_limit_s=time_limit_s, **conditions)
    except PinError as error:
        return Alternative(decision, chosen, condition, plan, "impossible", reason=str(error))
    except Infeasible as error:
        return _unfit(error, decision, chosen, condition, plan)
    return Alternative(
        decision,
        chosen,
        condition,
        plan,
        "solved",
        plan=found,
        changes=cost_changes(bench, plan, found),
        solve_s=time.perf_counter() - began,
    )


def _unfit(error: Infeasible, decision: str, chosen: str, condition: str, plan: Plan) -> Alternative:
    if error.needed_bytes is None:
        return Alternative(decision, chosen, condition, plan, "impossible", reason=str(error))
    limit = plan.options.memory_limit_bytes
    over = error.needed_bytes - limit
    reason = (
        f"the leanest plan found takes {bytes_text(error.needed_bytes)}, {bytes_text(over)} over the limit of "
        f"{bytes_text(limit)}"
    )
    return Alternative(
        decision, chosen, condition, plan, "does not fit", reason=reason, needed_bytes=error.needed_bytes
    )


def cost_changes(bench: Workbench, chosen: Plan, other: Plan) -> tuple[CostChange, ...]:
    """Kinds of cost that differ between two plans of one model, the largest difference first; they sum to the whole."""
    ours, theirs = bench.attribution(chosen).by_cost, bench.attribution(other).by_cost
    changes = [CostChange(name, ours.get(name, 0.0), theirs.get(name, 0.0)) for name in {**ours, **theirs}]
    rounding = 1e-9 * max(chosen.objective_s, other.objective_s)
    kept = [c for c in changes if abs(c.extra_s) > rounding]
    return tuple(sorted(kept, key=lambda c: (-abs(c.extra_s), c.name)))


def mesh_text(mesh: tuple[int, ...]) -> str:
    """ "2x4", or "1" for one device."""
    return "x".join(map(str, mesh)) or "1"


def pin_text(pin: Mapping[str, Any]) -> str:
    """A pin as one types it: "tp=8, layers.*.mlp=recompute"."""

    def value(v: Any) -> str:
        if isinstance(v, bool):
            return str(v).lower()
        return ",".join(map(str, v)) if isinstance(v, (tuple, list)) else str(v)

    return ", ".join(f"{key}={value(v)}" for key, v in pin.items())
