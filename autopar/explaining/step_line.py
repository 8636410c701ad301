"""The time line of a plan's step: its ops in the order of the graph, with conversions where their value is wanted.

The cost model adds everything up, so nothing overlaps here: the length is the step time of the plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import fx

from autopar.dataflow import is_backward, module_path, result_metas, value_name
from autopar.explaining.attribution import Attribution
from autopar.explaining.spans import TimeLine, one_after_another
from autopar.placements import State
from autopar.pricing import Transfer
from autopar.segments import block_of, recompute_times

COMPUTE = "compute"
HOST_LINK = "link to the host"
NOTE = (
    "The plan adds communication and compute up, so nothing overlaps: conversions stand where their value is first "
    "wanted, gradients where they are made, recomputation before the first op of the backward pass that needs it."
)

Part = tuple[str, str, str, float]  # track, kind, name, seconds
Wanted = tuple[str, str, State]  # phase, value, state


def step_line(attribution: Attribution) -> TimeLine:
    """One step on one rank: a track for compute, one for each mesh axis, one for the host where it is used."""
    links = [attribution.link(axis) for axis in range(len(attribution.costs.mesh))]
    host = [HOST_LINK] if attribution.price.offloads else []
    return TimeLine(one_after_another(_Walk(attribution).parts()), NOTE, (COMPUTE, *links, *host))


class _Walk:
    """Goes through the graph once and emits what runs; every op and every transfer of the price exactly once."""

    def __init__(self, attribution: Attribution) -> None:
        self.attribution, self.flow = attribution, attribution.flow
        self.decided = attribution.decisions.nodes
        self.waiting: dict[Wanted, Transfer] = {(t.phase, t.value, t.target): t for t in attribution.price.transfers}
        self.at_maker = self._of_outputs()
        self.again = self._again()
        self.back = {o.value: o.seconds / 2 for o in attribution.price.offloads}
        self.leaving = self._leaving(dict(self.back))

    def parts(self) -> Iterator[Part]:
        """Everything, in order."""
        for index, node in enumerate(self.flow.ops):
            for repeated in self.again.get(index, ()):
                yield from self._op(repeated, "backward", "recomputation")
            phase = "backward" if is_backward(node) else "forward"
            yield from self._op(node, phase, phase)
            for result in range(len(result_metas(node))):
                for key in self.at_maker.get(value_name(node, result), ()):
                    yield from self._transfer(key)
            for value, seconds in self.leaving.get(index, ()):
                yield HOST_LINK, "communication", f"{value} to the host", seconds
        for key in list(self.waiting):
            yield from self._transfer(key)
        yield COMPUTE, "optimizer", "optimizer", self.attribution.price.optimizer_s

    def _op(self, node: fx.Node, phase: str, kind: str) -> Iterator[Part]:
        states = self.decided[node.name].operand_states
        for operand, state in zip(self.flow.operands_of[node], states, strict=True):
            if phase == "backward" and operand.value in self.back:
                yield HOST_LINK, "communication", f"{operand.value} from the host", self.back.pop(operand.value)
            yield from self._transfer((phase, operand.value, state))
        yield COMPUTE, kind, _where(node), self.attribution.price.op_s[node.name]

    def _transfer(self, key: Wanted) -> Iterator[Part]:
        transfer = self.waiting.pop(key, None)
        if transfer is None:
            return
        what = self.attribution.role(transfer).split(",")[0]
        for kind, axis, _, seconds in transfer.steps:
            yield self.attribution.link(axis), "communication", f"{kind} of {what}", seconds

    def _leaving(self, away: dict[str, float]) -> dict[int, list[tuple[str, float]]]:
        """Behind the op of which index each value goes to the host: its last use in the forward pass."""
        last: dict[str, int] = {}
        for index, node in enumerate(self.flow.ops):
            if not is_backward(node):
                made = [value_name(node, result) for result in range(len(result_metas(node)))]
                last |= {v: index for v in (*made, *(o.value for o in self.flow.operands_of[node])) if v in away}
        found: dict[int, list[tuple[str, float]]] = defaultdict(list)
        for value, index in last.items():
            found[index].append((value, away[value]))
        return found

    def _of_outputs(self) -> dict[str, list[Wanted]]:
        """Transfers that no op waits for (gradients to where they are stored, outputs), by their value."""
        for_ops = set()
        for node in self.flow.ops:
            decision = self.decided[node.name]
            phases = ["backward" if is_backward(node) else "forward", *(["backward"] if decision.recompute else [])]
            for operand, state in zip(self.flow.operands_of[node], decision.operand_states, strict=True):
                for_ops |= {(phase, operand.value, state) for phase in phases}
        found: dict[str, list[Wanted]] = defaultdict(list)
        for key in self.waiting:
            if key not in for_ops:
                found[key[1]].append(key)
        return found

    def _again(self) -> dict[int, list[fx.Node]]:
        """Which ops run again right before the op of an index."""
        times = recompute_times(self.flow, {n.name: i for i, n in enumerate(self.flow.ops)})
        found: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self.flow.ops:
            if self.decided[node.name].recompute:
                found[times[node.name]].append(node)
        return found


def _where(node: fx.Node) -> str:
    """The part of a block that an op comes from; outside of blocks its module."""
    path = module_path(node)
    block = block_of(path)
    inner = path.removeprefix(block).strip(".").split(".")[0]
    return f"{block}.{inner}".strip(".") if block else path or "outside of modules"
