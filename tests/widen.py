"""The same model in float64 throughout, for parity to nine digits.

transformers' Llama casts to float32 inside its norms and its rotary embedding even where the
model is float64, so two programs that are both right differ by 1e-7. `widened` rewrites a trace
so that every such cast goes to float64, and under `WidenCasts` the eager model does the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from autopar.trace import Trace
from autopar.tracing.clean import clean


class WidenCasts(TorchDispatchMode):
    """While active, casts to float32 and float32 factories give float64, in forward and backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_wide(args), **_wide(kwargs or {}))


def widened(trace: Trace) -> Trace:
    """The trace with float64 in place of float32 in every op; placeholders but tangents keep their dtype."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    fake_mode = next(iter(trace.graph_module.graph.nodes)).meta["val"].fake_mode
    with fake_mode, torch.no_grad():
        for old in trace.graph_module.graph.nodes:
            node = new[old] = graph.node_copy(old, new.__getitem__)
            node.meta = dict(old.meta)
            if node.name in trace.tangents and node.meta["val"].dtype == torch.float32:
                node.meta["val"] = node.meta["val"].to(torch.float64)
            elif node.op == "call_function":
                node.args, node.kwargs = _wide(node.args), _wide(node.kwargs)
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    return _with_graph(trace, graph)


def _wide(value: Any) -> Any:
    """Arguments with float64 in place of float32."""
    return tree_map_only(torch.dtype, lambda d: torch.float64 if d == torch.float32 else d, value)


def _with_graph(trace: Trace, graph: fx.Graph) -> Trace:
    """`trace` with another graph of the same results, cleaned; nodes that its fields name may be others now."""
    clean(graph)  # a cast from float64 to float64 is no cast
    graph.lint()
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    output.meta["val"] = tuple(n.meta["val"] for n in output.args[0])
    names = [n.name for n in output.args[0]]
    now = dict(zip(trace.results, names, strict=True))
    ops = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    return replace(
        trace,
        graph_module=fx.GraphModule(nn.Module(), graph, class_name="JointGraph"),
        outputs=tuple(o if o.node is None else replace(o, node=now[o.node]) for o in trace.outputs),
        loss=trace.loss and now[trace.loss],
        grads={fqn: now[node] for fqn, node in trace.grads.items()},
        buffer_updates={fqn: now[node] for fqn, node in trace.buffer_updates.items()},
        num_forward=sum(n.meta["phase"] == "forward" for n in ops),
    )
