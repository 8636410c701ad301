"""Whether the decisions of a plan file are about this graph at all: every name, every count, every cut.

A plan whose graph hash fits may still have been edited by hand. What is found here is one PlanError; what two
decisions mean together is found when the program is written, and whether it computes the same by `verify`.
"""

from __future__ import annotations

from collections.abc import Iterable

from autopar.dataflow import Dataflow, result_metas, value_name
from autopar.errors import PlanError
from autopar.placements import State, local_shape
from autopar.plan_types import Decisions
from autopar.trace import Trace


def check_decisions(trace: Trace, decisions: Decisions, mesh: tuple[int, ...]) -> None:
    """Raise PlanError, naming the first decision that does not fit the trace."""
    flow = Dataflow.of(trace)
    shapes = {value_name(n, i): t.shape for n in trace.graph_module.graph.nodes
              for i, t in enumerate(result_metas(n)) if t is not None}  # fmt: skip
    _same("op", decisions.nodes, (n.name for n in flow.ops))
    _same("parameter", decisions.params, (p.fqn for p in trace.params))
    leaves = [o.node for o in trace.outputs if o.node]
    _same("output", decisions.outputs, {*trace.whole_outputs, *leaves, *trace.buffer_updates.values()})
    for value in (*decisions.kept, *(value for value, _ in decisions.kept_copies), *decisions.offloaded):
        if value not in shapes:
            raise PlanError(f"the plan keeps {value[:80]!r}, which this model does not make; plan this model again")
    for param in trace.params:
        _divides(f"parameter {param.fqn}", param.shape, decisions.params[param.fqn], mesh)
    for node in flow.ops:
        decision = decisions.nodes[node.name]
        counts = (len(decision.operand_states), len(decision.result_states))
        if counts != (len(flow.operands_of[node]), len(result_metas(node))):
            raise PlanError(
                f"the plan has states of {counts[0]} operands and {counts[1]} results for op {node.name}, which has "
                f"{len(flow.operands_of[node])} and {len(result_metas(node))}; plan this model again"
            )
        for operand, state in zip(flow.operands_of[node], decision.operand_states, strict=True):
            _divides(f"{operand.value}, taken by {node.name}", operand.base_tensor.shape, state, mesh)
        for index, (tensor, made) in enumerate(zip(result_metas(node), decision.result_states, strict=True)):
            if (tensor is None) != (made is None):
                raise PlanError(f"the plan and op {node.name} differ in whether it makes result {index}; plan again")
            if tensor is not None and made is not None:
                _divides(f"result {index} of {node.name}", tensor.shape, made, mesh)


def _same(what: str, planned: Iterable[str], real: Iterable[str]) -> None:
    planned, real = set(planned), set(real)
    if planned - real:
        raise PlanError(f"the plan decides {what} {min(planned - real)[:80]!r}, which this model lacks; plan it again")
    if real - planned:
        raise PlanError(f"the plan says nothing about {what} {min(real - planned)!r}; plan this model again")


def _divides(what: str, shape: Iterable[int], state: State, mesh: tuple[int, ...]) -> None:
    if local_shape(tuple(shape), state, mesh) is None:
        raise PlanError(f"{what} of shape {tuple(shape)} cannot be cut as {' '.join(state)} on mesh {mesh}; plan again")
