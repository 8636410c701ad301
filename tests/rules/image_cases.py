"""One-op graphs of convolutions, batch norm, pools, pads, resampling, and of rarer activations and losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  (it registers ops)
from torch import fx

from tests.rules.harness import case
from tests.rules.samples import F64, aten, ints, randn

# (transposed, groups, input channels, output channels)
KINDS = ((False, 1, 4, 8), (False, 4, 4, 8), (False, 2, 8, 8), (False, 8, 8, 8), (True, 1, 8, 4), (True, 2, 8, 4))


def convolutions() -> Iterator[fx.Node]:
    for transposed, groups, channels, out in KINDS:
        x, b = randn(4, channels, 6, 6), randn(out)
        w = randn(channels, out // groups, 3, 3) if transposed else randn(out, channels // groups, 3, 3)
        options: tuple[Any, ...] = ([2, 2], [1, 1], [1, 1], transposed, [1, 1] if transposed else [0, 0], groups)
        made = aten.convolution(x, w, b, *options)
        yield case(aten.convolution.default, x, w, b, *options)
        yield case(aten.convolution.default, x, w, None, *options)
        for wanted in ([True, True, True], [True, True, False], [False, True, True], [True, False, False]):
            size = [out] if wanted[2] else None
            yield case(aten.convolution_backward.default, torch.randn_like(made), x, w, size, *options, wanted)
    signal, weight = randn(4, 4, 16), randn(8, 4, 4)
    yield case(aten.convolution.default, signal, weight, randn(8), [4], [0], [1], False, [0], 1)


def batch_norms() -> Iterator[fx.Node]:
    w, b, low, high = randn(8), randn(8), randn(8) + 3, torch.rand(8, dtype=F64) + 0.5
    for shape in ((4, 8, 4, 4), (8, 8), (4, 8, 4)):
        x, g = randn(*shape) * 0.5 + 3, randn(*shape)
        for weight, bias in ((w, b), (None, None)):
            for training in (True, False):
                stats = (low, high, training, 0.1, 1e-5)
                yield case(aten._native_batch_norm_legit_functional.default, x, weight, bias, *stats)
            yield case(aten._native_batch_norm_legit.no_stats, x, weight, bias, True, 0.1, 1e-5)
            yield case(aten._native_batch_norm_legit_no_training.default, x, weight, bias, low, high, 0.1, 1e-5)
            _, mean, invstd = aten._native_batch_norm_legit.no_stats(x, weight, bias, True, 0.1, 1e-5)
            for training in (True, False):
                for wanted in ([True, True, True], [True, False, False], [False, True, True]):
                    if weight is None:
                        wanted = [wanted[0], False, False]
                    if any(wanted):
                        rest = (weight, low, high, mean, invstd, training, 1e-5, wanted)
                        yield case(aten.native_batch_norm_backward.default, g, x, *rest)
            rest = (weight, None, None, mean, invstd, True, 1e-5, [True, weight is not None, weight is not None])
            yield case(aten.native_batch_norm_backward.default, g, x, *rest)
    empty = torch.empty(0, dtype=F64)
    x, g = randn(4, 8, 4, 4), randn(4, 8, 4, 4)
    rest = (w, low, high, empty, empty, False, 1e-5, [True, True, True])
    yield case(aten.native_batch_norm_backward.default, g, x, *rest)


def weight_norms() -> Iterator[fx.Node]:
    v = randn(8, 4, 16)
    for dim, size in ((0, (8, 1, 1)), (2, (1, 1, 16))):
        g = randn(*size)
        _, norms = aten._weight_norm_interface(v, g, dim)
        yield case(aten._weight_norm_interface.default, v, g, dim)
        yield case(aten._weight_norm_interface_backward.default, randn(8, 4, 16), v, g, norms, dim)


def narrow_batch_norms() -> Iterator[fx.Node]:
    """bfloat16 with weights and statistics in float32."""
    w, b, low, high = (randn(8), randn(8), randn(8) + 3, torch.rand(8, dtype=F64) + 0.5)
    narrow = randn(4, 8, 4, 4, dtype=torch.bfloat16)
    wide = [t.float() for t in (w, b, low, high)]
    yield case(aten._native_batch_norm_legit_functional.default, narrow, *wide, True, 0.1, 1e-5)
    _, mean, invstd = aten._native_batch_norm_legit.no_stats(narrow, *wide[:2], True, 0.1, 1e-5)
    rest = (wide[0], *wide[2:], mean, invstd, True, 1e-5, [True, True, True])
    yield case(aten.native_batch_norm_backward.default, torch.randn_like(narrow), narrow, *rest)


def pools() -> Iterator[fx.Node]:
    x, cube = randn(4, 4, 8, 8), randn(4, 4, 4, 4, 4)
    pooled, where = aten.max_pool2d_with_indices(x, [2, 2])
    yield case(aten.max_pool2d_with_indices.default, x, [2, 2])
    window: tuple[Any, ...] = ([2, 2], [2, 2], [0, 0], [1, 1], False)
    yield case(aten.max_pool2d_with_indices_backward.default, torch.randn_like(pooled), x, *window, where)
    pooled, where = aten.max_pool3d_with_indices(cube, [2, 2, 2])
    yield case(aten.max_pool3d_with_indices.default, cube, [2, 2, 2])
    window = ([2] * 3, [2] * 3, [0] * 3, [1] * 3, False)
    yield case(aten.max_pool3d_with_indices_backward.default, torch.randn_like(pooled), cube, *window, where)
    pooled, where = aten.adaptive_max_pool2d(x, [2, 2])
    yield case(aten.adaptive_max_pool2d.default, x, [2, 2])
    yield case(aten.adaptive_max_pool2d_backward.default, torch.randn_like(pooled), x, where)
    yield case(aten.avg_pool2d.default, x, [2, 2])
    yield case(aten.avg_pool2d.default, randn(4, 8, 8), [2, 2])
    average: tuple[Any, ...] = ([2, 2], [2, 2], [0, 0], False, True, None)
    yield case(aten.avg_pool2d_backward.default, randn(4, 4, 4, 4), x, *average)
    yield case(aten.avg_pool3d.default, cube, [2, 2, 2])
    average = ([2] * 3, [2] * 3, [0] * 3, False, True, None)
    yield case(aten.avg_pool3d_backward.default, randn(4, 4, 2, 2, 2), cube, *average)
    yield case(aten._adaptive_avg_pool2d.default, x, [2, 2])
    yield case(aten._adaptive_avg_pool2d_backward.default, randn(4, 4, 2, 2), x)
    yield case(aten._adaptive_avg_pool3d.default, cube, [2, 2, 2])
    yield case(aten._adaptive_avg_pool3d_backward.default, randn(4, 4, 2, 2, 2), cube)


def pads_and_sizes() -> Iterator[fx.Node]:
    inputs = (randn(4, 4, 8), randn(4, 4, 4, 4), randn(4, 4, 4, 4, 4))
    for pixels, x in enumerate(inputs, 1):
        for kind in ("reflection", "replication"):
            forward = getattr(aten, f"{kind}_pad{pixels}d")
            pad = [1] * (2 * pixels)
            yield case(forward.default, x, pad)
            grad = torch.randn_like(forward(x, pad))
            yield case(getattr(aten, f"{kind}_pad{pixels}d_backward").default, grad, x, pad)
    kinds: tuple[tuple[str, int, tuple[Any, ...]], ...] = (
        ("nearest1d", 1, ()), ("nearest2d", 2, ()), ("nearest3d", 3, ()), ("linear1d", 1, (False,)),
        ("bilinear2d", 2, (False,)), ("bicubic2d", 2, (False,)), ("trilinear3d", 3, (False,)),
    )  # fmt: skip
    for name, pixels, extra in kinds:
        x, size = inputs[pixels - 1], [6] * pixels
        forward = getattr(aten, f"upsample_{name}").default
        yield case(forward, x, size, *extra)
        grad = torch.randn_like(forward(x, size, *extra))
        yield case(getattr(aten, f"upsample_{name}_backward").default, grad, size, list(x.shape), *extra)
    x, grid = inputs[1], torch.rand(4, 6, 6, 2, dtype=F64) * 2 - 1
    yield case(aten.grid_sampler_2d.default, x, grid, 0, 0, False)
    grad = randn(4, 4, 6, 6)
    yield case(aten.grid_sampler_2d_backward.default, grad, x, grid, 0, 0, False, [True, True])


def channel_blocks() -> Iterator[fx.Node]:
    yield case(aten.pixel_shuffle.default, randn(4, 16, 3, 3), 2)
    yield case(aten.pixel_unshuffle.default, randn(4, 4, 4, 4), 2)
    yield case(aten.im2col.default, randn(4, 4, 6, 6), [3, 3], [1, 1], [1, 1], [2, 2])
    yield case(aten.col2im.default, randn(4, 4 * 9, 9), [6, 6], [3, 3], [1, 1], [1, 1], [2, 2])


def activations() -> Iterator[fx.Node]:
    x, g = randn(4, 8), randn(4, 8)
    yield case(aten.floor_divide.default, ints(9, 4, 8), ints(5, 8) + 1)
    for op in (aten.hardswish, aten.hardsigmoid, aten.mish, aten.elu, aten.leaky_relu, aten.log_sigmoid_forward):
        yield case(op.default, x)
    yield case(aten.hardswish_backward.default, g, x)
    yield case(aten.hardsigmoid_backward.default, g, x)
    yield case(aten.hardtanh_backward.default, g, x, -1.0, 1.0)
    yield case(aten.hardshrink_backward.default, g, x, 0.5)
    yield case(aten.softshrink_backward.default, g, x, 0.5)
    yield case(aten.mish_backward.default, g, x)
    yield case(aten.elu_backward.default, g, 1.0, 1.0, 1.0, False, x)
    yield case(aten.leaky_relu_backward.default, g, x, 0.1, False)
    yield case(aten.log_sigmoid_backward.default, g, x, aten.log_sigmoid_forward(x)[1])
    yield case(aten.logit_backward.default, g, x.sigmoid(), 1e-6)
    for weight in (randn(1, 8), randn(1, 1)):
        yield case(aten._prelu_kernel.default, x, weight)
        yield case(aten._prelu_kernel_backward.default, g, x, weight)
    for dim in (0, -1):
        yield case(aten.glu.default, randn(4, 8, 4), dim)
        yield case(aten.glu_backward.default, randn(4, 8, 2), randn(4, 8, 4), -1)
        yield case(aten._safe_softmax.default, x, dim)
        for op in (aten.logcumsumexp, aten.cummax, aten.cummin):
            yield case(op.default, x, dim)


def more_losses() -> Iterator[fx.Node]:
    x, p, target = randn(4, 8), randn(4, 8).sigmoid(), torch.rand(4, 8, dtype=F64)
    for reduction in (0, 1, 2):
        for weight in (None, torch.rand(8, dtype=F64), torch.rand(4, 8, dtype=F64)):
            grad = torch.randn_like(aten.binary_cross_entropy(p, target, weight, reduction))
            yield case(aten.binary_cross_entropy.default, p, target, weight, reduction)
            yield case(aten.binary_cross_entropy_backward.default, grad, p, target, weight, reduction)
            yield case(aten.binary_cross_entropy_with_logits.default, x, target, weight, weight, reduction)
        grad = torch.randn_like(aten.soft_margin_loss(x, target, reduction))
        yield case(aten.soft_margin_loss.default, x, target, reduction)
        yield case(aten.soft_margin_loss_backward.default, grad, x, target, reduction)


def more_indexing() -> Iterator[fx.Node]:
    x, rows, columns = randn(4, 8, 8), ints(8, 8), ints(8, 4, 1)
    yield case(aten._unsafe_index.Tensor, x, [None, columns, rows])
    yield case(aten._unsafe_index.Tensor, x, [ints(4, 4), None, ints(8, 4)])
    for accumulate in (True, False):
        places = [None, torch.arange(8).view(8, 1), torch.arange(4)]
        for values in (randn(4, 8, 4), randn(1, 1, 4), randn()):
            yield case(aten.index_put.default, x, places, values, accumulate)
            yield case(aten._unsafe_index_put.default, x, places, values, accumulate)
    yield case(aten.index_put.default, x, [ints(4, 8), None, ints(8, 4, 1)], randn(4, 8, 8), True)
    for dim in (0, 1):
        index = torch.tensor([1, 0, 2, 1])
        yield case(aten.index_add.default, x, dim, index, randn(*(4 if d == dim else n for d, n in enumerate(x.shape))))
        apart = torch.tensor([1, 0])
        source = randn(*(2 if d == dim else n for d, n in enumerate(x.shape)))
        yield case(aten.index_copy.default, x, dim, apart, source)
        yield case(aten.index_fill.int_Scalar, x, dim, apart, 2.0)
    for reduce in ("sum", "amax", "mean"):
        yield case(aten.scatter_reduce.two, randn(4, 8), 1, ints(8, 4, 4), randn(4, 4), reduce)
    yield case(aten.bucketize.Tensor, randn(4, 8), torch.linspace(-1, 1, 6, dtype=F64))
    yield case(aten.histc.default, randn(4, 8), 8, -1, 1)


def more_products() -> Iterator[fx.Node]:
    yield case(aten.mv.default, randn(4, 8), randn(8))
    low = torch.float32
    ends = torch.tensor([4, 8], dtype=torch.int32)
    yield case(aten._grouped_mm.default, randn(8, 16, dtype=low), randn(2, 16, 8, dtype=low), ends)
    yield case(aten._grouped_mm.default, randn(8, 16, dtype=low).t(), randn(8, 8, dtype=low), ends)
    for ends in (torch.tensor([4, 8]), torch.tensor([3, 8]), torch.tensor([0, 7]), torch.tensor([8, 8])):
        rows, matrices, ends = randn(8, 16), randn(2, 16, 4), ends.to(torch.int32)
        yield case(torch.ops.transformers.grouped_mm_fallback.default, rows, matrices, ends)
        yield case(torch.ops.transformers.grouped_mm_fallback_backward.default, rows, matrices, ends, randn(8, 4))


IMAGE_GROUPS = {
    group.__name__: group
    for group in (
        convolutions,
        batch_norms,
        weight_norms,
        pools,
        pads_and_sizes,
        channel_blocks,
        activations,
        more_losses,
        more_indexing,
        more_products,
    )
}
