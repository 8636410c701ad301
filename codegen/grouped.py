"""Products of rows with the matrix of their group, one group after the other, as ops for CPUs.

Where torch has no kernel that takes the traced dtype, transformers computes grouped products in a loop of `mm`. These
do the same with the faster library's product for each group that is large enough (`codegen/products.py`), and write
each row once: as fast in float32 where groups are small, up to a fifth less time where they are large
(`benchmarks/products.py`). Rows behind the last group are zero, as is the gradient of a group without rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from autopar.codegen.products import is_faster, onednn_product

Tensor = torch.Tensor
ops = torch.ops.autopar

_library = torch.library.Library("autopar", "FRAGMENT")
_library.define("grouped_product(Tensor rows, Tensor matrices, Tensor ends) -> Tensor")
_library.define(
    "grouped_product_backward(Tensor rows, Tensor matrices, Tensor ends, Tensor gradient) -> (Tensor, Tensor)"
)


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each group and the rows that belong to it."""
    start = 0
    for group, end in enumerate(ends.tolist()):
        yield group, slice(start, end)
        start = end


def _write(out: Tensor, left: Tensor, right: Tensor) -> None:
    if is_faster(left, right):
        out.copy_(onednn_product(left, right))
    else:
        torch.mm(left, right, out=out)


def _product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    there = slice(0, 0)
    for group, there in _groups(ends):
        _write(out[there], rows[there], matrices[group])
    out[there.stop :].zero_()
    return out


def _product_backward(rows: Tensor, matrices: Tensor, ends: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    of_rows, of_matrices = torch.empty_like(rows), torch.empty_like(matrices)
    there = slice(0, 0)
    for group, there in _groups(ends):
        _write(of_rows[there], gradient[there], matrices[group].t())
        torch.mm(rows[there].t(), gradient[there], out=of_matrices[group])
    of_rows[there.stop :].zero_()
    return of_rows, of_matrices


def _fake_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[2])


def _fake_backward(rows: Tensor, matrices: Tensor, ends: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(matrices)


for _name, _kernel, _fake in (
    ("grouped_product", _product, _fake_product),
    ("grouped_product_backward", _product_backward, _fake_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autopar::{_name}", _fake, lib=_library)

_OURS = {
    "transformers.grouped_mm_fallback.default": ops.grouped_product.default,
    "transformers.grouped_mm_fallback_backward.default": ops.grouped_product_backward.default,
}


def take_grouped_products(graph: fx.Graph) -> None:
    """Let these ops do what transformers would do in its loop."""
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target) in _OURS:
            node.args = (*node.args, *(node.kwargs[name] for name in ("offs", "grad_output") if name in node.kwargs))
            node.kwargs = {}
            node.target = _OURS[str(node.target)]
