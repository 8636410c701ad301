"""Where the time of a step goes: to which resource, to which collectives, to which ops."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from autopar.cost.collectives import axis_span
from autopar.cost.compute import OpClass, op_class
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.dataflow import Dataflow, ViewMaps, gradient_values, is_backward, module_path, result_metas
from autopar.opcost import compute_dtype, local_bytes, op_flops_of, work_share
from autopar.plan_types import Decisions
from autopar.pricing import Price, Transfer, price
from autopar.redistribute import ConversionTables
from autopar.trace import Trace

COMPUTE, MEMORY, LAUNCH = "compute", "memory bandwidth", "launches"


@dataclass(frozen=True)
class OpGroup:
    """Ops that do the same in identical layers: "model.layers.*.mlp.up_proj: mm, forward".

    again_s: what running them again costs, on top of seconds.
    """

    name: str
    nodes: tuple[str, ...]
    seconds: float
    again_s: float = 0.0


def folded(path: str) -> str:
    """A dotted name with its numbers replaced: "model.layers.3.mlp" -> "model.layers.*.mlp"."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def op_name(node: fx.Node) -> str:
    """ "mm" of aten.mm.default; "layer_norm" of a function of that name."""
    target = node.target
    text = str(target) if not callable(target) or hasattr(target, "_schema") else getattr(target, "__name__", "op")
    parts = text.split(".")
    return parts[1] if len(parts) == 3 else text


def group_name(node: fx.Node) -> str:
    """The group that an op belongs to: where it comes from, what it does, in which pass."""
    where = folded(module_path(node)) or "the model"
    return f"{where}: {op_name(node)}, {'backward' if is_backward(node) else 'forward'}"


class Attribution:
    """The time of one plan, taken apart. All parts of one kind sum up to the step time.

    price: of the plan, from scratch.
    """

    def __init__(self, trace: Trace, decisions: Decisions, costs: CostModel, optimizer: OptimizerSpec) -> None:
        self.trace, self.decisions, self.costs = trace, decisions, costs
        self.price: Price = price(trace, decisions, costs, optimizer)
        self.flow = Dataflow.of(trace)

    @cached_property
    def op_groups(self) -> tuple[OpGroup, ...]:
        """All ops, the most expensive group first."""
        nodes: dict[str, list[fx.Node]] = defaultdict(list)
        for node in self.flow.ops:
            nodes[group_name(node)].append(node)
        seconds = self.price.op_s
        groups = [
            OpGroup(
                name,
                tuple(n.name for n in found),
                sum(seconds[n.name] for n in found),
                sum(seconds[n.name] for n in found if self.decisions.nodes[n.name].recompute),
            )
            for name, found in nodes.items()
        ]
        return tuple(sorted(groups, key=lambda g: (-g.seconds - g.again_s, g.name)))

    @cached_property
    def by_resource(self) -> dict[str, float]:
        """Seconds by what they wait for: arithmetic, memory, the launch of kernels, the link of each mesh axis."""
        seconds: dict[str, float] = defaultdict(float)
        for node in self.flow.ops:
            times = 2 if self.decisions.nodes[node.name].recompute else 1
            for resource, part in self._op_parts(node):
                seconds[resource] += times * part
        for transfer in self.price.transfers:
            for resource, part in self._transfer_parts(transfer):
                seconds[resource] += part
        if self.price.offloads:
            seconds["link to the host"] += self.price.offload_s
        self._add_optimizer(seconds)
        return {name: part for name, part in sorted(seconds.items(), key=lambda item: -item[1]) if part > 0}

    @cached_property
    def by_cost(self) -> dict[str, float]:
        """Seconds by kind of work ("mm, forward") and of conversion ("all_reduce of gradients over 8 ranks")."""
        seconds: dict[str, float] = defaultdict(float)
        for node in self.flow.ops:
            spent = self.price.op_s[node.name]
            seconds[f"{op_name(node)}, {'backward' if is_backward(node) else 'forward'}"] += spent
            if self.decisions.nodes[node.name].recompute:
                seconds[f"{op_name(node)}, run again"] += spent
        for transfer in self.price.transfers:
            for kind, axis, _, spent in transfer.steps:
                seconds[f"{kind} of {self.role(transfer)} over {self._span(axis)}"] += spent
        if self.price.offloads:
            seconds["copies to the host and back"] += self.price.offload_s
        seconds["optimizer"] += self.price.optimizer_s
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))

    # -- parts -------------------------------------------------------------------------

    def _op_parts(self, node: fx.Node) -> Iterator[tuple[str, float]]:
        """One run of an op: launch, arithmetic, memory; the rest of its price is collectives inside its lowering."""
        decision, operands = self.decisions.nodes[node.name], self.flow.operands_of[node]
        mesh = self.costs.mesh
        reads = {}
        for operand, base in zip(operands, decision.operand_states, strict=True):
            state = self._views.forward(operand, base)
            if state is not None:
                reads[operand.value, state] = local_bytes(operand.tensor, state, mesh)
        made = zip(result_metas(node), decision.result_states, strict=True)
        moved = sum(reads.values()) + sum(local_bytes(t, s, mesh) for t, s in made if t is not None and s is not None)
        flops = op_flops_of(node) * work_share(decision.rules, mesh)
        kind = op_class(node.target)
        parts = roofline_parts(self.costs, kind, flops, moved, compute_dtype(node, operands))
        yield from parts.items()
        rest = self.price.op_s[node.name] - sum(parts.values())
        axes = [axis for axis, rule in enumerate(decision.rules) if rule.collectives]
        for axis in axes if rest > 0 else ():
            yield self.link(axis), rest / len(axes)

    def _transfer_parts(self, transfer: Transfer) -> Iterator[tuple[str, float]]:
        costs = self._tables.costs(bucketed=transfer.value in self._gradients)
        launch = self._launch_s
        for kind, axis, nbytes, spent in transfer.steps:
            link = 0.0 if kind == "slice" else min(spent, costs.collective_s(kind, nbytes, axis))
            copies = spent - link
            yield self.link(axis), link
            if copies > 0:
                yield LAUNCH, min(copies, launch)
                yield MEMORY, max(0.0, copies - launch)

    def _add_optimizer(self, seconds: dict[str, float]) -> None:
        total = self.price.optimizer_s
        launches = min(total, self._launch_s * len(self.trace.grads)) if total else 0.0
        seconds[LAUNCH] += launches
        seconds[MEMORY] += total - launches

    # -- words ---------------------------------------------------------------------------

    def link(self, axis: int) -> str:
        """The link that a mesh axis uses, by its ranks and nodes."""
        return f"link of axis {axis} ({self._span(axis)})"

    def _span(self, axis: int) -> str:
        nodes = axis_span(self.costs.axes[axis], self.costs.cluster).nodes
        where = f", {nodes} nodes" if nodes > 1 else ""
        return f"{self.costs.mesh[axis]} ranks{where}"

    def role(self, transfer: Transfer) -> str:
        """What a transfer moves: "parameters", "gradients" (of parameters), or activations of one of the passes."""
        if transfer.value in self._params:
            return "parameters"
        if transfer.value in self._gradients:
            return "gradients"
        return "activations" if transfer.phase == "forward" else "activations, backward,"

    @cached_property
    def _params(self) -> frozenset[str]:
        return frozenset(p.node for p in self.trace.params)

    @cached_property
    def _gradients(self) -> frozenset[str]:
        return gradient_values(self.flow, self.trace.grads.values())

    @cached_property
    def _views(self) -> ViewMaps:
        return ViewMaps(self.costs.mesh, self.decisions.fold(self.trace.fold))

    @cached_property
    def _tables(self) -> ConversionTables:
        return ConversionTables(self.costs.mesh, self.costs, self.decisions.fold(self.trace.fold))

    @cached_property
    def _launch_s(self) -> float:
        return self.costs.op_s(OpClass.ELEMENTWISE, 0.0, 0.0, "float32")


def roofline_parts(costs: CostModel, kind: OpClass, flops: float, nbytes: float, dtype: str) -> dict[str, float]:
    """The seconds of one op as launch + arithmetic or memory, whichever binds (both for attention, which adds up).

    Read off the cost model by asking it for the same op without bytes.
    """
    total = costs.op_s(kind, flops, nbytes, dtype)
    launch = min(total, costs.op_s(OpClass.ELEMENTWISE, 0.0, 0.0, dtype))
    without_bytes = max(launch, costs.op_s(kind, flops, 0.0, dtype))
    compute = min(total, without_bytes) - launch
    if kind is not OpClass.ATTENTION and not math.isclose(without_bytes, total, rel_tol=1e-9):
        compute = 0.0  # a roof: memory takes longer and hides the arithmetic
    return {LAUNCH: launch, COMPUTE: compute, MEMORY: total - launch - compute}
