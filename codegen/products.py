"""Products of matrices by the library that is fastest at them, where torch has more than one.

On CPUs torch takes MKL for float32. oneDNN, which torch brings along for `Linear` in its own compiled programs, needs 5
to 20 % less time for matrices that are not small (AMD EPYC with AVX-512, one thread, both by `benchmarks/products.py`).
It makes contiguous results and takes a first factor that is contiguous: forward products and gradients of their inputs,
not those of weights.
"""

from __future__ import annotations

import torch
from torch import fx

from autopar._torch_compat import onednn_linear

aten = torch.ops.aten
_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)
_LEAST_WORK = 2**24  # multiplications; below, calling costs more than the better kernel saves
_LEAST_ROWS = 8  # a product with few rows reads its matrix once, oneDNN would lay it out anew before


def take_faster_products(graph: fx.Graph) -> None:
    """Let oneDNN do the products of `graph` that it is faster at. Needs the tensors' shapes in `meta["val"]`."""
    if onednn_linear is None:
        return
    for target, bias_at in ((aten.mm.default, None), (aten.addmm.default, 0)):
        for node in graph.find_nodes(op="call_function", target=target):
            *bias, left, right = node.args
            if node.kwargs or not _pays(left.meta["val"], right.meta["val"]):
                continue
            if bias_at is not None and bias[0].meta["val"].dim() != 1:
                continue
            with graph.inserting_before(node):
                weight = _transposed(graph, right)
                new = graph.call_function(onednn_linear, (left, weight, bias[0] if bias else None, "none", [], ""))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            if not right.users:
                graph.erase_node(right)


def _pays(left: torch.Tensor, right: torch.Tensor) -> bool:
    rows, shared = left.shape
    dense = right.is_contiguous() or right.t().is_contiguous()
    return (
        left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and left.is_contiguous()
        and dense
        and rows >= _LEAST_ROWS
        and rows * shared * right.shape[1] >= _LEAST_WORK
    )


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
