"""Which ops of a trace draw random numbers."""

from __future__ import annotations

from autopar._torch_compat import OpOverload
from autopar.rules import is_random
from autopar.rules.schema import op_call
from autopar.trace import Trace


def random_nodes(traced: Trace) -> list[str]:
    """The nodes of a trace that draw random numbers."""
    ops = (n for n in traced.graph_module.graph.nodes if isinstance(n.target, OpOverload))
    return [n.name for n in ops if is_random(op_call(n))]
