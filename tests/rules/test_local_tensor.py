"""The lowerings that communicate, with torch's own collectives and rank-dependent integers (LocalTensorMode)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from autopar._torch_compat import local_parts, local_tensor, simulated_mesh
from autopar.codegen.lowerings import lower
from autopar.rules import operands, results
from tests.rules.cases import F64, aten, ints, randn
from tests.rules.harness import case, cut, glue, rule_pairs

MESH = (2, 2)
c10d = torch.ops._c10d_functional


class GroupContext:
    """A LowerContext that writes torch's functional collectives."""

    def __init__(self, groups: list[str]) -> None:
        self.mesh, self.graph, self.groups = MESH, fx.Graph(), groups
        self.coords = [self.graph.placeholder(f"coord{axis}") for axis in range(len(MESH))]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def coord(self, axis: int) -> fx.Node:
        return self.coords[axis]

    def all_reduce(self, x: fx.Node, axis: int, op: str = "sum") -> fx.Node:
        return self.call(c10d.wait_tensor.default, self.call(c10d.all_reduce.default, x, op, self.groups[axis]))


def communicating() -> list[fx.Node]:
    torch.manual_seed(0)
    scores, targets = randn(8, 16).log_softmax(-1), ints(16, 8)
    targets[2] = -100
    _, total = aten.nll_loss_forward(scores, targets, None, 1, -100)
    return [
        case(aten._log_softmax.default, randn(8, 16), 1, False),
        case(aten._log_softmax_backward_data.default, randn(8, 16), scores, 1, F64),
        case(aten._softmax.default, randn(8, 16), 1, False),
        case(aten.nll_loss_forward.default, scores, targets, None, 1, -100),
        case(aten.nll_loss_backward.default, randn(), scores, targets, None, 1, -100, total),
        case(aten.embedding.default, randn(16, 8), ints(16, 8)),
        case(aten.embedding_dense_backward.default, randn(8, 8), ints(16, 8), 16, 3, False),
    ]


@pytest.mark.parametrize("node", communicating(), ids=lambda node: str(node.target))
def test_with_torchs_collectives(node: fx.Node) -> None:
    own = [rules for rules in rule_pairs(node, MESH) if any(rule.lowering != "local" for rule in rules)]
    assert len(own) >= 3, "a lowering of its own on one axis, on the other, and on both"
    with simulated_mesh(MESH) as (groups, coordinates):
        for rules in own:
            ctx = GroupContext(groups)
            local = [ctx.graph.placeholder(f"x{slot}") for slot, _ in enumerate(operands(node))]
            ctx.graph.output(lower(ctx, node, rules, local))
            inputs = list(coordinates)
            for slot, source in enumerate(operands(node)):
                parts = cut(source.meta["val"], tuple(rule.inputs[slot] for rule in rules), MESH)
                inputs.append(local_tensor({rank: part.contiguous() for rank, part in enumerate(parts)}))
            values = fx.GraphModule(torch.nn.Module(), ctx.graph)(*inputs)
            for index, whole in enumerate(results(node)):
                parts_of = local_parts(values[index])
                assert parts_of is not None
                state = tuple(rule.outputs[index] for rule in rules)
                actual = glue([parts_of[rank] for rank in sorted(parts_of)], state, MESH, 1e-10)
                torch.testing.assert_close(actual, whole, rtol=1e-10, atol=1e-10)
