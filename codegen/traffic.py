"""Bytes that a rank sends in an emitted program, counted on its graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx

from autopar.codegen.builder import GROUP_PREFIX, is_collective, nbytes
from autopar.codegen.emit import EmittedProgram
from autopar.codegen.exchange import start_permute
from autopar.traffic import Traffic, sent_bytes

_EXCHANGES = (torch.ops.autopar.dispatch_rows.default, torch.ops.autopar.combine_rows.default)
_KINDS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
}


def emitted_traffic(program: EmittedProgram) -> Traffic:
    """What one rank sends in a forward and a backward pass."""
    return graph_traffic(program.forward, program.mesh) + graph_traffic(program.backward, program.mesh)


def graph_traffic(graph: fx.Graph, mesh: Sequence[int]) -> Traffic:
    """What one rank sends in one graph."""
    found: Traffic = Counter()
    for node in graph.nodes:
        if node.target in _EXCHANGES:  # of as many rows as in a plan; the counts that go before them are not counted
            axis = int(str(node.args[-1]).removeprefix(GROUP_PREFIX))
            rows = node.args[0].meta["val"] if node.target is _EXCHANGES[1] else node.meta["val"]
            found["all_to_all", axis] += sent_bytes("all_to_all", nbytes(rows), mesh[axis])  # type: ignore[assignment]
        if not is_collective(node):
            continue
        kind = _kind(node)
        axis = int(str(node.args[-1]).removeprefix(GROUP_PREFIX))
        source = node.args[0]
        assert isinstance(source, fx.Node)
        whole = max(nbytes(source.meta["val"]), nbytes(node.meta["val"]))
        found[kind, axis] += sent_bytes(kind, whole, mesh[axis])  # type: ignore[assignment]
    return found


def _kind(node: fx.Node) -> str:
    if node.target is start_permute:
        return "permute"
    name = str(node.target.overloadpacket).removeprefix("_c10d_functional.")  # type: ignore[union-attr]
    return _KINDS[name.removesuffix("_")]  # the same in place
