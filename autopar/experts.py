"""What of a trace belongs to experts: their parameters, and the rows between the moves to them and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from autopar.dataflow import Dataflow, result_metas, value_name
from autopar.grouping import FROM_GROUPS, TO_GROUPS, is_grouped_product
from autopar.trace import Trace

_CASTS = frozenset({torch.ops.aten._to_copy.default})


@dataclass(frozen=True)
class ExpertSide:
    """values: names of values, parameters included, of which a rank of several expert ranks has its experts' part.

    count: of experts in a layer; 0 where there are none in grouped products.
    """

    values: frozenset[str]
    count: int

    @staticmethod
    def of(trace: Trace) -> ExpertSide:
        """Read off the graph."""
        flow = Dataflow.of(trace)
        matrices, counts = _matrices(flow)
        values = set(matrices)
        for node in flow.ops:
            reached = any(o.value in values for o in flow.operands_of[node])
            if node.target is TO_GROUPS or (reached and node.target is not FROM_GROUPS):
                values |= {value_name(node, i) for i in range(len(result_metas(node)))}
        return ExpertSide(frozenset(values), math.gcd(*counts) if counts else 0)


def _matrices(flow: Dataflow) -> tuple[set[str], set[int]]:
    """Parameters that grouped products take, and how many matrices there are in each."""
    made_by = {value_name(n): n for n in flow.ops}
    found, counts = set(), set()
    for node in flow.ops:
        if not is_grouped_product(node):
            continue
        for operand in flow.operands_of[node]:
            if operand.tensor.dim() != 3:
                continue
            counts.add(int(operand.tensor.shape[0]))
            value = operand.value
            while value in made_by and made_by[value].target in _CASTS:
                value = flow.operands_of[made_by[value]][0].value
            if value not in made_by:
                found.add(value)
    return found, counts
