"""Products of matrices by the library that is fastest at them, where torch has more than one.

On CPUs torch takes MKL for float32. oneDNN, which torch brings along for `Linear` in its own compiled programs, mostly
needs 5 to 20 % less time for matrices that are not small (AMD EPYC with AVX-512, one thread;
`benchmarks/products.py`). It makes contiguous results and takes a first factor that is contiguous: forward products
and gradients of their inputs, not those of weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autopar._torch_compat import onednn_linear

aten = torch.ops.aten
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)
# oneDNN can also apply a function to a product; gradients need it as it is.
_NOTHING_AFTER: tuple[Any, ...] = ("none", [], "")
_LEAST_WORK = 2**24  # multiplications; below, calling costs more than the better kernel saves
_LEAST_ROWS = 8  # a product with few rows reads its matrix once, oneDNN would lay it out anew before


def take_faster_products(graph: fx.Graph) -> None:
    """Let the faster library do the products of `graph` whose operands' shapes are known (`meta["val"]`)."""
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if not all("val" in operand.meta for operand in _operands(node)):
                continue  # read back from what `dump_dir` wrote
            *bias, left, right = (operand.meta["val"] for operand in _operands(node))
            one_row_added = not bias or bias[0].dim() == 1
            if not node.kwargs and one_row_added and is_faster(left, right):
                _take_onednn(graph, node)


def is_faster(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether oneDNN's product of two matrices is the faster one."""
    return (
        onednn_linear is not None
        and left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and left.is_contiguous()
        and (right.is_contiguous() or right.t().is_contiguous())
        and left.shape[0] >= _LEAST_ROWS
        and left.shape[0] * left.shape[1] * right.shape[1] >= _LEAST_WORK
    )


def onednn_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right by oneDNN."""
    assert onednn_linear is not None
    made: torch.Tensor = onednn_linear(left, right.t(), None, *_NOTHING_AFTER)
    return made


def _operands(node: fx.Node) -> list[fx.Node]:
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def _take_onednn(graph: fx.Graph, node: fx.Node) -> None:
    assert onednn_linear is not None
    *bias, left, right = _operands(node)
    with graph.inserting_before(node):
        weight = _transposed(graph, right)
        new = graph.call_function(onednn_linear, (left, weight, bias[0] if bias else None, *_NOTHING_AFTER))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    if not right.users:
        graph.erase_node(right)


def _transposed(graph: fx.Graph, matrix: fx.Node) -> fx.Node:
    """The matrix as `Linear` holds it: what the transposing before took, or one transposing more."""
    if matrix.target in _TRANSPOSES:
        original = matrix.args[0]
        assert isinstance(original, fx.Node)
        held, seen = original.meta["val"], matrix.meta["val"]
        if held.dim() == 2 and held.t().shape == seen.shape and held.t().stride() == seen.stride():
            return original
    new = graph.call_function(aten.t.default, (matrix,))
    new.meta = matrix.meta | {"val": matrix.meta["val"].t()}
    return new
