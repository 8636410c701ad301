"""A plan: every decision about one model on one cluster, as data that can be saved, read and compared.

The file is JSON and nothing else: it is parsed, checked field by field and never executed.
The same input gives the same bytes, so wall-clock times are not part of the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from autopar.cluster import ClusterSpec
from autopar.cost.checks import shown
from autopar.cost.optimizer import OptimizerSpec
from autopar.errors import AutoparError, PlanError
from autopar.files import write_atomically
from autopar.json_reader import Reader, finite
from autopar.placements import State, is_placement
from autopar.plan_types import Decisions, NodeDecision
from autopar.precision import PRECISIONS
from autopar.rules.types import AxisRule

if TYPE_CHECKING:
    from autopar.explain import Report
    from autopar.explaining.difference import PlanDifference
    from autopar.explaining.workbench import Workbench

SCHEMA_VERSION = 4
# 1: plans op by op; 2: also plans by degrees (`autopar.staged`); 3: with offload to the host; 4: with what is dealt out


@dataclass(frozen=True)
class InputShape:
    """One tensor input that the plan was made for: its path in the call, shape and dtype ("int64")."""

    path: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class PlanOptions:
    """What the user asked for. precision: see `autopar.precision`."""

    global_batch: int
    precision: str
    optimizer: str
    memory_limit_bytes: int
    pin: Mapping[str, Any] = field(default_factory=dict)
    inputs: str = "global"
    model: str | None = None  # how the command line loads the model again


@dataclass(frozen=True)
class Candidate:
    """A mesh that was tried: "optimal", "feasible", "leanest", "infeasible" or "cut off" (by its lower bound)."""

    mesh: tuple[int, ...]
    status: str
    objective_s: float | None
    bound_s: float | None


@dataclass(frozen=True)
class Plan:
    """What to run where.

    graph_hash: of the joint graph the decisions talk about.
    mesh: sizes of the mesh axes, outermost (slowest links) first.
    roles: what each axis mostly does: "dp", "cp", "tp" or "none".
    predicted: figures of the cost model, see `autopar.pricing`.
    gap: proven, relative: no plan of this search space is faster than objective * (1 - gap).
    timings: trace_s and solve_s of this process; not saved.
    bench: what it takes to solve again, while the trace is at hand; not saved.
    """

    graph_hash: str
    torch_version: str
    cluster: ClusterSpec
    mesh: tuple[int, ...]
    roles: tuple[str, ...]
    options: PlanOptions
    inputs: tuple[InputShape, ...]
    decisions: Decisions
    layout_keys: Mapping[str, Any]
    predicted: Mapping[str, Any]
    status: str
    objective_s: float
    bound_s: float
    gap: float
    candidates: tuple[Candidate, ...]
    unruled: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict, compare=False)
    bench: Workbench | None = field(default=None, compare=False, repr=False)

    @property
    def devices(self) -> int:
        """Number of ranks."""
        return self.cluster.devices

    def batch_axes(self) -> tuple[bool, ...]:
        """Per mesh axis, whether it cuts the batch."""
        return tuple(role == "dp" for role in self.roles)

    def layout(self) -> dict[str, Any]:
        """The chosen layout in the keys of the command line (dp, tp, ...)."""
        return dict(self.layout_keys)

    def to_summary(self) -> dict[str, Any]:
        """The figures that `autopar plan --json` prints."""
        return {
            **self.layout_keys,
            **self.predicted,
            "status": self.status,
            "gap": self.gap,
            "solve_s": self.timings.get("solve_s"),
            "trace_s": self.timings.get("trace_s"),
        }

    def explain(
        self,
        model: nn.Module | None = None,
        *,
        example_inputs: Any = None,
        time_limit_s: float | None = None,
    ) -> Report:
        """Why this plan: see `autopar.explain.Report`.

        model: of a plan that was loaded from a file, so that alternatives can be solved; it is traced again.
        example_inputs: (args, kwargs); made up from the plan's shapes if not given.
        time_limit_s: for all alternatives that the report solves when it is printed.
        Raises PlanMismatch if the plan was made for another model.
        """
        from autopar.explain import DEFAULT_REPORT_S, Report

        bench = self.bench
        if model is not None:
            # upwards, to the face: a plan can be solved again only by what made it
            bench = import_module("autopar.api").reopen(self, model, example_inputs)
        plan = bench.whole(self) if bench else self
        return Report(plan, bench, DEFAULT_REPORT_S if time_limit_s is None else time_limit_s)

    def diff(self, other: Plan) -> PlanDifference:
        """What `other` does differently; raises PlanMismatch if it is for another model or batch."""
        from autopar.explaining.difference import difference

        return difference(self, other)

    def staged_data(self) -> dict[str, Any] | None:
        """What the file of a plan by degrees holds beside these fields."""
        return None

    # -- file ------------------------------------------------------------------------

    def dumps(self) -> str:
        """The plan as JSON text."""
        return json.dumps(_encode(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan to a file; either the whole file is written or the old one stays."""
        try:
            write_atomically(path, self.dumps())
        except OSError as error:
            raise PlanError(f"cannot write plan {path}: {error.strerror or error}; nothing was changed") from error

    @classmethod
    def loads(cls, text: str, where: str = "plan") -> Plan:
        """Read a plan from JSON text; raises PlanError for anything that is not a plan of a known version."""
        try:
            data = json.loads(text, parse_float=finite, parse_constant=finite)
        except (ValueError, RecursionError) as error:
            raise PlanError(
                f"{where}: not a plan file (not JSON: {error}); make it again with `autopar plan`"
            ) from None
        try:
            return _decode(Reader(data, where))
        except PlanError:
            raise
        except AutoparError as error:  # of the cluster or the optimizer in it
            raise PlanError(f"{where}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise PlanError(f"{where}: not a usable plan file ({error}); make it again with `autopar plan`") from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file."""
        try:
            text = Path(path).read_text()
        except (OSError, ValueError) as error:  # ValueError: not text, or no path at all
            raise PlanError(f"cannot read plan {path}: {error}") from None
        return cls.loads(text, str(path))

    def with_timings(self, **seconds: float) -> Self:
        """The same plan with wall-clock times of this process."""
        return replace(self, timings={**self.timings, **seconds})


# -- encoding ---------------------------------------------------------------------------


def _encode(plan: Plan) -> dict[str, Any]:
    rules: dict[tuple[Any, ...], int] = {}

    def rule_number(rule: AxisRule) -> int:
        return rules.setdefault((rule.inputs, rule.outputs, rule.lowering), len(rules))

    nodes = {
        name: {
            "rules": [rule_number(r) for r in d.rules],
            "take": [_join(s) for s in d.operand_states],
            "make": [_join(s) for s in d.result_states],
            "recompute": d.recompute,
        }
        for name, d in sorted(plan.decisions.nodes.items())
    }
    staged = plan.staged_data()
    return {
        "autopar_plan": 4 if plan.decisions.dealt else 1 if staged is None and not plan.decisions.offloaded else 3,
        **({} if staged is None else {"staged": staged}),
        "torch_version": plan.torch_version,
        "graph_hash": plan.graph_hash,
        "cluster": json.loads(plan.cluster.to_json()),
        "mesh": list(plan.mesh),
        "roles": list(plan.roles),
        "options": {**plan.options.__dict__, "pin": dict(plan.options.pin)},
        "inputs": [{"path": i.path, "shape": list(i.shape), "dtype": i.dtype} for i in plan.inputs],
        "layout": dict(plan.layout_keys),
        "predicted": dict(plan.predicted),
        "solver": {
            "status": plan.status,
            "objective_s": plan.objective_s,
            "bound_s": plan.bound_s,
            "gap": plan.gap,
            "candidates": [{**c.__dict__, "mesh": list(c.mesh)} for c in plan.candidates],
        },
        "unruled": list(plan.unruled),
        "rules": [{"in": list(i), "out": list(o), "lowering": low} for i, o, low in rules],
        "nodes": nodes,
        "params": {fqn: _join(s) for fqn, s in plan.decisions.params.items()},
        "outputs": {name: _join(s) for name, s in plan.decisions.outputs.items()},
        "kept": sorted(plan.decisions.kept),
        "kept_copies": sorted([v, _join(s)] for v, s in plan.decisions.kept_copies),
        **({"offloaded": sorted(plan.decisions.offloaded)} if plan.decisions.offloaded else {}),
    }


def _join(state: State | None) -> str | None:
    return None if state is None else " ".join(state)


# -- decoding ---------------------------------------------------------------------------


def _decode(reader: Reader) -> Plan:
    version = reader.get("autopar_plan", int)
    if version > SCHEMA_VERSION:
        raise PlanError(
            f"{reader.where}: written by a newer autopar (plan version {version}, this one reads up to "
            f"{SCHEMA_VERSION}); upgrade autopar or plan again"
        )
    reader.check("autopar_plan", version >= 1, "there is no such version")
    mesh, roles = reader.ints("mesh"), reader.strings("roles")
    cluster = ClusterSpec.from_json(json.dumps(reader.get("cluster", dict)))
    by_degrees = version > 1 and "staged" in reader.data
    fits = all(size >= 1 for size in mesh) and (math.prod(mesh) == cluster.devices or by_degrees)
    reader.check("mesh", fits, f"sizes must multiply to the {cluster.devices} devices of the cluster")
    known = len(roles) == len(mesh) and (set(roles) <= {"dp", "cp", "tp", "none"} or by_degrees)
    reader.check("roles", known, f"expected dp, cp, tp or none for each of {len(mesh)} mesh axes")
    solver = reader.sub("solver")
    plan = Plan(
        graph_hash=reader.get("graph_hash", str),
        torch_version=reader.get("torch_version", str),
        cluster=cluster,
        mesh=mesh,
        roles=roles,
        options=_decode_options(reader.sub("options")),
        inputs=tuple(_decode_input(r) for r in reader.subs("inputs")),
        decisions=_decode_decisions(reader, len(mesh)),
        layout_keys=reader.get("layout", dict),
        predicted=reader.get("predicted", dict),
        status=solver.get("status", str),
        objective_s=solver.number("objective_s"),
        bound_s=solver.number("bound_s"),
        gap=solver.number("gap"),
        candidates=tuple(
            Candidate(
                r.ints("mesh"), r.get("status", str), r.optional_number("objective_s"), r.optional_number("bound_s")
            )
            for r in solver.subs("candidates")
        ),
        unruled=reader.strings("unruled"),
    )
    if not by_degrees:
        return plan
    from autopar.staged import staged

    return staged(plan, reader.sub("staged"))


def _decode_input(reader: Reader) -> InputShape:
    shape, dtype = reader.ints("shape"), reader.get("dtype", str)
    reader.check("shape", all(0 <= size < 2**63 for size in shape), "sizes must not be negative or huge")
    reader.check("dtype", isinstance(getattr(torch, dtype, None), torch.dtype), "torch has no such dtype")
    return InputShape(reader.get("path", str), shape, dtype)


def _decode_options(reader: Reader) -> PlanOptions:
    OptimizerSpec(reader.get("optimizer", str))  # AutoparError if there is none of that name
    reader.check("precision", reader.get("precision", str) in PRECISIONS, f"expected one of {', '.join(PRECISIONS)}")
    return PlanOptions(
        global_batch=reader.get("global_batch", int),
        precision=reader.get("precision", str),
        optimizer=reader.get("optimizer", str),
        memory_limit_bytes=reader.get("memory_limit_bytes", int),
        pin=reader.get("pin", dict),
        inputs=reader.get("inputs", str),
        model=reader.get("model", (str, type(None))),
    )


def _decode_decisions(reader: Reader, axes: int) -> Decisions:
    def state(text: Any) -> State:
        parts = tuple(text.split(" ")) if isinstance(text, str) and text else ()
        if len(parts) != axes or not all(is_placement(p) for p in parts):
            raise PlanError(f"{reader.where}: {shown(text)} is not a state on a mesh of {axes} axes")
        return parts

    rules = [_decode_rule(r) for r in reader.subs("rules")]
    nodes = {}
    for name, data in reader.get("nodes", dict).items():
        node = Reader(data, f"{reader.where}: node {name[:80]!r}")
        numbers = node.ints("rules")
        known = len(numbers) == axes and all(0 <= i < len(rules) for i in numbers)
        node.check("rules", known, f"expected {axes} numbers of the {len(rules)} rules")
        for key, sides in (("take", [rules[i].inputs for i in numbers]), ("make", [rules[i].outputs for i in numbers])):
            fits = all(len(side) == len(node.get(key, list)) for side in sides)
            node.check(key, fits, "expected as many states as the rules have")
        nodes[name] = NodeDecision(
            rules=tuple(rules[i] for i in numbers),
            operand_states=tuple(state(s) for s in node.get("take", list)),
            result_states=tuple(None if s is None else state(s) for s in node.get("make", list)),
            recompute=node.get("recompute", bool),
        )
    copies = reader.get("kept_copies", list)
    paired = all(isinstance(c, list) and len(c) == 2 and isinstance(c[0], str) for c in copies)
    reader.check("kept_copies", paired, "expected [value, state] pairs")
    return Decisions(
        nodes=nodes,
        params={fqn: state(s) for fqn, s in reader.get("params", dict).items()},
        outputs={name: state(s) for name, s in reader.get("outputs", dict).items()},
        kept=frozenset(reader.strings("kept")),
        kept_copies=frozenset((value, state(s)) for value, s in copies),
        offloaded=frozenset(reader.strings("offloaded")) if "offloaded" in reader.data else frozenset(),
    )


def _decode_rule(reader: Reader) -> AxisRule:
    outputs = reader.get("out", list)
    if not all(o is None or (isinstance(o, str) and is_placement(o)) for o in outputs):
        raise PlanError(f"{reader.where}: not a placement in {shown(outputs)}")
    inputs = reader.strings("in")
    if not all(is_placement(i) for i in inputs):
        raise PlanError(f"{reader.where}: not a placement in {shown(list(inputs))}")
    return AxisRule(inputs, tuple(outputs), reader.get("lowering", str))
