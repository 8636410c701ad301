"""Which ops are measured, with which arguments.

Each case is one ATen op, called as an emitted program calls it. A `size` is the number of elements of its main
operand, or the width of a square matrix product. How large a call is (FLOPs, or bytes read and written) is counted
by the cost model's own functions, so that a curve is measured and read in the same unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autopar._torch_compat import pytree
from autopar.cost.compute import OpClass, op_class, op_flops, op_name

aten = torch.ops.aten
Maker = Callable[..., torch.Tensor]  # normal numbers of a shape
Arguments = tuple[Any, ...]

ROW = 256  # of softmax and norms
VOCABULARY = 4096
FEW_HEADS, MANY_HEADS, HEAD_DIM = 4, 64, 64


@dataclass(frozen=True)
class Case:
    """One op. names: of the curves it stands for: its own, and that of its class where it is its example."""

    target: Any
    arguments: Callable[[Maker, int], Arguments]
    sizes: tuple[int, ...]
    names: tuple[str, ...]


def work(target: Any, args: Arguments, result: Any) -> float:
    """The size of a call: FLOPs of a matrix product or convolution, else bytes read and written."""
    if op_class(target) in (OpClass.MATMUL, OpClass.CONVOLUTION):
        return float(op_flops(target, args, {}, result))
    return moved_bytes(args, result)


def moved_bytes(args: Arguments, result: Any) -> float:
    """Bytes of all tensors that a call takes and makes."""
    tensors = [t for t in pytree.tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
    return float(sum(t.numel() * t.element_size() for t in tensors))


def cases(quick: bool) -> tuple[Case, ...]:
    """All ops but attention; the `quick` ones take a tenth of the time and know fewer ops and sizes."""
    square = (16, 64, 128, 256, 512) if quick else (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
    flat = tuple(1 << k for k in ((9, 14, 18, 21) if quick else (9, 12, 14, 16, 18, 20, 22, 24)))
    few = flat if quick else tuple(1 << k for k in (9, 12, 15, 17, 19, 21, 23))
    images = (1, 4) if quick else (1, 4, 16)
    found = [
        _case(aten.mm.default, lambda new, n: (new(n, n), new(n, n)), square, "matmul"),
        _case(aten.mul.Tensor, lambda new, n: (new(n), new(n)), flat, "elementwise"),
        _case(aten.sum.dim_IntList, lambda new, n: (new(n // ROW, ROW), [0]), few, "reduction"),
        _case(aten.embedding.default, _embedding, few, "other"),
        _case(aten.native_dropout.default, lambda new, n: (new(n), 0.1, True), few, "random"),
        _case(aten.convolution.default, _convolution, images, "convolution"),
        _case(aten.convolution_backward.default, _convolution_backward, images),
        *(_case(target, lambda new, n: (new(n),), few) for target in _UNARY),
        *(_case(target, lambda new, n: (new(n), new(n)), few) for target in _GRADIENTS),
        *(_case(target, arguments, few) for target, arguments in _NORMALIZATIONS),
        _case(aten.clone.default, lambda new, n: (new(n // ROW, ROW).t(),), few),
        _case(aten.cat.default, lambda new, n: ([new(n), new(n)],), few),
    ]
    if quick:
        skipped = ("sigmoid", "sigmoid_backward", "tanh", "tanh_backward", "exp", "cat", "mean", "pow")
        return tuple(case for case in found if case.names[0] not in skipped)
    return tuple(found)


def attention_shapes(quick: bool) -> tuple[tuple[int, int, int], ...]:
    """(heads of all samples, tokens of a sequence, width of a head): few heads tell the overhead, many the rates."""
    lengths = (16, 64, 256) if quick else (16, 64, 128, 256, 512, 1024)
    widths = (HEAD_DIM,) if quick else (16, 32, HEAD_DIM, 128)
    many = [(MANY_HEADS * 64 // length or 1, length, width) for length in lengths for width in widths]
    return (*many, *((FEW_HEADS, length, width) for length in lengths[:3] for width in widths))


def _case(target: Any, arguments: Callable[[Maker, int], Arguments], sizes: Sequence[int], *classes: str) -> Case:
    return Case(target, arguments, tuple(sizes), tuple(dict.fromkeys((op_name(target), *classes))))


_UNARY = (
    aten.gelu.default,
    aten.silu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.exp.default,
    aten.rsqrt.default,
    aten.relu.default,
)
_GRADIENTS = (
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.tanh_backward.default,
    aten.sigmoid_backward.default,
)


def _rows(new: Maker, elements: int, width: int = ROW) -> torch.Tensor:
    return new(math.ceil(elements / width), width)


def _softmax_backward(new: Maker, elements: int) -> Arguments:
    rows = _rows(new, elements)
    return new(*rows.shape), rows.softmax(-1), -1, rows.dtype


def _log_softmax_backward(new: Maker, elements: int) -> Arguments:
    rows = _rows(new, elements)
    return new(*rows.shape), rows.log_softmax(-1), -1, rows.dtype


def _norm(new: Maker, elements: int) -> Arguments:
    return _rows(new, elements), [ROW], new(ROW), new(ROW), 1e-5


def _norm_backward(new: Maker, elements: int) -> Arguments:
    rows, weight, bias = _rows(new, elements), new(ROW), new(ROW)
    _, mean, rstd = aten.native_layer_norm.default(rows, [ROW], weight, bias, 1e-5)
    return new(*rows.shape), rows, [ROW], mean, rstd, weight, bias, [True, True, True]


_NORMALIZATIONS: tuple[tuple[Any, Callable[[Maker, int], Arguments]], ...] = (
    (aten._softmax.default, lambda new, n: (_rows(new, n), -1, False)),
    (aten._softmax_backward_data.default, _softmax_backward),
    (aten._log_softmax.default, lambda new, n: (_rows(new, n), -1, False)),
    (aten._log_softmax_backward_data.default, _log_softmax_backward),
    (aten.native_layer_norm.default, _norm),
    (aten.native_layer_norm_backward.default, _norm_backward),
    (aten.mean.dim, lambda new, n: (_rows(new, n), [-1], True)),
    (aten.pow.Tensor_Scalar, lambda new, n: (new(n), 2)),
)


def _embedding(new: Maker, elements: int) -> Arguments:
    rows = max(1, elements // ROW)
    table = new(min(VOCABULARY, rows), ROW)
    return table, torch.randint(0, len(table), (rows,), device=table.device)


def _convolution(new: Maker, images: int) -> Arguments:
    return new(images, 32, 28, 28), new(32, 32, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1


def _convolution_backward(new: Maker, images: int) -> Arguments:
    image, weight, _, *rest = _convolution(new, images)
    return new(images, 32, 28, 28), image, weight, None, *rest, [True, True, False]
