"""The decisions of a plan, and each against its next best: the problem solved again with the chosen one forbidden."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from autopar.dataflow import is_backward, module_path
from autopar.errors import AutoparError
from autopar.explaining.alternatives import Alternative, mesh_text, solved_again
from autopar.explaining.attribution import Attribution, folded
from autopar.explaining.workbench import DEFAULT_AGAIN_S, Workbench, with_pins
from autopar.pins import MESH_KEYS, Forbidden
from autopar.placements import State
from autopar.plan_types import NodeDecision
from autopar.plans import Candidate, Plan
from autopar.segments import block_of
from autopar.tracing.types import Trace


@dataclass(frozen=True)
class Decision:
    """One decision that can be asked about, in identical layers at once.

    kind: "mesh", "storage" (of parameters), "activations" (of a module: kept or made again) or "op".
    name: "mesh", or a pattern of names, see `Report.decisions`.
    chosen: in words. weight: bytes or seconds that hang on it, to tell the important ones.
    members: parameter names or op names.
    """

    kind: str
    name: str
    chosen: str
    weight: float
    members: tuple[str, ...] = field(default=(), repr=False)

    @property
    def title(self) -> str:
        """What it is about, for a table."""
        return self.name if self.kind == "mesh" else f"{self.kind} of {self.name}"


def decisions(bench: Workbench, plan: Plan) -> tuple[Decision, ...]:
    """Every decision of a plan: the mesh first, then each kind by weight."""
    attribution = bench.attribution(plan)
    kinds = (_storage(plan, bench.trace), _activations(plan, attribution), _operators(plan, attribution))
    mesh = [Decision("mesh", "mesh", mesh_text(plan.mesh), math.inf)] if plan.mesh else []
    by_weight = (sorted(kind, key=lambda d: (-d.weight, d.name)) for kind in kinds)
    return (*mesh, *(d for kind in by_weight for d in kind))


def headline(found: Iterable[Decision]) -> list[Decision]:
    """The few that a report asks about: the mesh, the largest parameters, the heaviest activations, the slowest ops."""
    most = {"mesh": 1, "storage": 3, "activations": 1, "op": 2}
    shown: list[Decision] = []
    for decision in found:
        most[decision.kind] -= 1
        if most[decision.kind] >= 0:
            shown.append(decision)
    return shown


def find(found: Iterable[Decision], name: str) -> list[Decision]:
    """Decisions of that name or title; AutoparError with the nearest names if there is none."""
    every = list(found)
    exact = [d for d in every if name in (d.name, d.title, d.kind)]
    named = exact or [d for d in every if d.name.endswith(f".{name}") or f".{name}:" in d.name]
    if not named:
        names = ", ".join(d.title for d in every[:12])
        raise AutoparError(f"the plan has no decision {name!r}; ask for one of: {names}" + (" ..." * (len(every) > 12)))
    return named


def next_best(
    bench: Workbench, plan: Plan, decision: Decision, *, time_limit_s: float = DEFAULT_AGAIN_S
) -> Alternative:
    """The best plan that decides otherwise. All but the mesh are asked on the mesh of the plan."""
    if decision.kind == "mesh":
        return _other_mesh(bench, plan, decision, time_limit_s)
    if decision.kind == "activations":
        return _other_activations(bench, plan, decision, time_limit_s)
    if decision.kind == "storage":
        states = {fqn: plan.decisions.params[fqn] for fqn in decision.members}
        forbidden = Forbidden(params=states)
    else:
        forbidden = Forbidden(ops={name: plan.decisions.nodes[name].rules for name in decision.members})
    found = solved_again(
        bench,
        plan,
        decision=decision.title,
        chosen=decision.chosen,
        condition=f"not {decision.chosen}",
        time_limit_s=time_limit_s,
        fixed_mesh=plan.mesh,
        forbidden=forbidden,
    )
    if found.plan is None:
        return found
    if decision.kind == "storage":
        return _saying(found, _states_text(found.plan.decisions.params[fqn] for fqn in decision.members))
    nodes = found.plan.decisions.nodes
    if any(nodes[name].rules == plan.decisions.nodes[name].rules for name in decision.members):
        return _impossible(found, "there is no other way to run it on this mesh")
    return _saying(found, _rules_text(nodes[name] for name in decision.members))


# -- the kinds of decisions --------------------------------------------------------------


def _storage(plan: Plan, trace: Trace) -> Iterator[Decision]:
    sizes = {p.fqn: math.prod(p.shape) * p.dtype.itemsize for p in trace.params}
    groups: dict[tuple[str, State], list[str]] = defaultdict(list)
    for fqn, state in plan.decisions.params.items():
        groups[folded(fqn), state].append(fqn)
    for (name, state), members in groups.items() if plan.mesh else ():
        yield Decision("storage", name, _states_text([state]), sum(sizes[m] for m in members), tuple(members))


def _activations(plan: Plan, attribution: Attribution) -> Iterator[Decision]:
    """Per module that forward ops come from: of a block its children, elsewhere the outermost modules."""
    groups: dict[str, list[str]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    for node in attribution.flow.ops:
        path = module_path(node)
        if is_backward(node) or not path:
            continue
        name = folded(_module_to_ask(path))
        groups[name].append(node.name)
        seconds[name] += attribution.price.op_s[node.name]
    for name, members in groups.items():
        again = sum(plan.decisions.nodes[m].recompute for m in members)
        chosen = "all kept" if not again else f"{again} of {len(members)} ops run again"
        yield Decision("activations", name, chosen, seconds[name], tuple(members))


def _module_to_ask(path: str) -> str:
    block = block_of(path)
    inner = path.removeprefix(block).strip(".").split(".")[0]
    return f"{block}.{inner}".strip(".") if inner else block


def _operators(plan: Plan, attribution: Attribution) -> Iterator[Decision]:
    for group in attribution.op_groups if plan.mesh else ():
        chosen = _rules_text(plan.decisions.nodes[name] for name in group.nodes)
        yield Decision("op", group.name, chosen, group.seconds + group.again_s, group.nodes)


# -- the next best of each -----------------------------------------------------------------


def _other_mesh(bench: Workbench, plan: Plan, decision: Decision, time_limit_s: float) -> Alternative:
    """The other meshes in the order of what the search knew of them, until the rest is proven to be no better."""
    title, chosen, condition = decision.title, decision.chosen, "another mesh"
    if set(plan.options.pin) & MESH_KEYS:
        return Alternative(title, chosen, condition, plan, "pinned by you")
    deadline = time.perf_counter() + time_limit_s
    others = sorted((c for c in plan.candidates if c.mesh != plan.mesh), key=_promise)
    best: Alternative | None = None
    unasked = ""
    for index, other in enumerate(others):
        if best is not None and best.plan is not None and _promise(other) >= best.plan.objective_s:
            break
        left = deadline - time.perf_counter()
        if best is not None and left <= 0:
            unasked = "not asked in the time: " + ", ".join(mesh_text(c.mesh) for c in others[index:])
            break
        found = solved_again(
            bench,
            plan,
            decision=title,
            chosen=chosen,
            condition=condition,
            time_limit_s=max(left, 0.0) / 2,
            fixed_mesh=other.mesh,
        )
        best = found if best is None or _rank(found) < _rank(best) else best
    if best is None:
        return Alternative(title, chosen, condition, plan, "impossible", reason="no other mesh was considered")
    return replace(best, instead=mesh_text(best.plan.mesh), reason=unasked) if best.plan else best


def _promise(candidate: Candidate) -> float:
    """No plan on this mesh is known to be faster than this."""
    if candidate.objective_s is not None:
        return candidate.objective_s if candidate.status == "optimal" else (candidate.bound_s or 0.0)
    return math.inf if candidate.status == "infeasible" else (candidate.bound_s or 0.0)


def _rank(alternative: Alternative) -> tuple[float, float]:
    if alternative.plan is not None:
        return alternative.plan.objective_s, 0.0
    return math.inf, float(alternative.needed_bytes or math.inf)


def _other_activations(bench: Workbench, plan: Plan, decision: Decision, time_limit_s: float) -> Alternative:
    """Kept ones are pinned to be made again, others to be kept."""
    again = any(plan.decisions.nodes[m].recompute for m in decision.members)
    word, instead = ("keep", "all kept") if again else ("recompute", "made again")
    if any(value in ("keep", "recompute") for value in plan.options.pin.values()) or "recompute" in plan.options.pin:
        return Alternative(decision.title, decision.chosen, instead, plan, "pinned by you")
    found = solved_again(
        bench,
        plan,
        decision=decision.title,
        chosen=decision.chosen,
        condition=f"{decision.name}={word}",
        options=with_pins(plan.options, {decision.name: word}),
        time_limit_s=time_limit_s,
        fixed_mesh=plan.mesh,
    )
    if found.plan is None:
        return found
    now = sum(found.plan.decisions.nodes[m].recompute for m in decision.members)
    if bool(now) == again:
        return _impossible(found, "the backward pass wants nothing that these ops make")
    return _saying(found, instead if not now else f"{now} of {len(decision.members)} ops run again")


# -- words -----------------------------------------------------------------------------------


def _saying(found: Alternative, instead: str) -> Alternative:
    return replace(found, instead=instead)


def _impossible(found: Alternative, reason: str) -> Alternative:
    return replace(found, outcome="impossible", reason=reason, plan=None, changes=())


def _states_text(states: Iterable[State]) -> str:
    return _or([", ".join(state) or "whole" for state in states])


def _rules_text(nodes: Iterable[NodeDecision]) -> str:
    def text(node: NodeDecision) -> str:
        sides = [" x ".join(rule.inputs) + " -> " + ", ".join(o or "none" for o in rule.outputs) for rule in node.rules]
        return "; ".join(sides) or "whole"

    return _or([text(n) for n in nodes])


def _or(texts: list[str]) -> str:
    unique = list(dict.fromkeys(texts))
    return unique[0] if len(unique) == 1 else f"{unique[0]} or {len(unique) - 1} other way{'s' * (len(unique) > 2)}"
