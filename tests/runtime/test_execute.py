"""What a rank's graph hands out before it has arrived."""

from __future__ import annotations

import torch
from torch import fx

from autopar.codegen.builder import c10d
from autopar.runtime.execute import hand_out_early


def reduced(*, used: bool) -> fx.Graph:
    """(loss, other) -> both summed over an axis; `used`: the summed loss is computed with."""
    graph = fx.Graph()
    loss, other = graph.placeholder("loss"), graph.placeholder("other")
    sums = [graph.call_function(c10d.all_reduce.default, (x, "sum", "0")) for x in (loss, other)]
    waited = [graph.call_function(c10d.wait_tensor.default, (s,)) for s in sums]
    extra = [graph.call_function(torch.ops.aten.neg.default, (waited[0],))] if used else []
    graph.output((*waited, *extra))
    return graph


def waits(graph: fx.Graph) -> int:
    return len(graph.find_nodes(op="call_function", target=c10d.wait_tensor.default))


def test_a_sum_that_is_only_handed_out_is_not_waited_for() -> None:
    graph = reduced(used=False)
    assert hand_out_early(graph, 1) == (0,)
    assert waits(graph) == 1  # the other result is not among the first ones
    graph.lint()


def test_a_sum_that_is_computed_with_is_waited_for() -> None:
    graph = reduced(used=True)
    assert hand_out_early(graph, 1) == ()
    assert waits(graph) == 2
