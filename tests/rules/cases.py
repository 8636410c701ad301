"""One-op graphs for every op that has rules, with the arguments that have misled rules before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import fx

from autopar.grouping import FROM_GROUPS, TO_GROUPS
from tests.rules.attention_cases import ATTENTION_GROUPS
from tests.rules.harness import case
from tests.rules.image_cases import IMAGE_GROUPS
from tests.rules.samples import F64, I64, aten, ints, mask, randn

Case = Callable[[], fx.Node]


def elementwise() -> Iterator[fx.Node]:
    x, y, row, column = randn(4, 8), randn(4, 8), randn(8), randn(4, 1)
    for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        yield case(op, x, y)
        yield case(op, x, row)
        yield case(op, column, y)
        yield case(op, x, 2.5)
        yield case(op, x, randn())
    yield case(aten.add.Tensor, x, y, alpha=3.0)
    yield case(aten.add.Scalar, x, 1.0)
    yield case(aten.sub.Scalar, x, 1.0)
    yield case(aten.rsub.Scalar, x, 1.0)
    yield case(aten.mul.Scalar, x, 3.0)
    yield case(aten.div.Scalar, x, 3.0)
    yield case(aten.div.Tensor_mode, x, y, rounding_mode="floor")
    yield case(aten.add.Tensor, ints(9, 4, 8), ints(9, 4, 8))
    yield case(aten.add.Tensor, randn(4, 8, dtype=torch.float32), y)
    for op in (aten.neg, aten.exp, aten.relu, aten.rsqrt, aten.abs, aten.silu, aten.gelu, aten.tanh, aten.sign):
        yield case(op.default, x)
    yield case(aten.pow.Tensor_Scalar, x, 2)
    yield case(aten.clamp.default, x, -1.0, 1.0)
    for op in (aten.eq, aten.lt, aten.ge):
        yield case(op.Tensor, x, y)
        yield case(op.Scalar, x, 0.0)
    yield case(aten.where.self, mask(4, 8), x, y)
    yield case(aten.where.self, mask(4, 1), x, randn())
    yield case(aten.masked_fill.Scalar, x, mask(4, 8), 0.0)
    yield case(aten.masked_fill.Scalar, x, mask(8), -1.5)
    yield case(aten.masked_fill.Tensor, x, mask(4, 8), randn())
    yield case(aten.logical_not.default, mask(4, 8))
    yield case(aten.addcmul.default, x, y, row)


def copies() -> Iterator[fx.Node]:
    x = randn(4, 8)
    yield case(aten.clone.default, x)
    yield case(aten.clone.default, randn(4, 8).t(), memory_format=torch.contiguous_format)
    for dtype in (torch.float32, torch.float64, I64, torch.bool):
        yield case(aten._to_copy.default, x, dtype=dtype)
        yield case(aten._to_copy.default, randn(4, 8, dtype=torch.float32), dtype=dtype)
    yield case(torch.ops.prims.convert_element_type.default, randn(4, 8, dtype=torch.float32), F64)
    yield case(torch.ops.prims.convert_element_type.default, x, torch.float32)
    yield case(aten.copy.default, x, randn(4, 8))
    yield case(aten.copy.default, x, randn(8))
    yield case(aten.lift_fresh_copy.default, x)
    yield case(aten.fill.Scalar, x, 2.0)
    yield case(aten.fill.Scalar, x, 0.0)
    yield case(aten.fill.Tensor, x, randn())


def backwards() -> Iterator[fx.Node]:
    x, g = randn(4, 8), randn(4, 8)
    yield case(aten.gelu_backward.default, g, x)
    yield case(aten.silu_backward.default, g, x)
    yield case(aten.sigmoid_backward.default, g, x.sigmoid())
    yield case(aten.tanh_backward.default, g, x.tanh())
    yield case(aten.threshold_backward.default, g, x, 0)
    yield case(aten.softplus_backward.default, g, x, 1.0, 20.0)
    yield case(aten.native_dropout.default, x, 0.0, True)
    yield case(aten.native_dropout.default, x, 0.5, False)
    yield case(aten.native_dropout_backward.default, g, mask(4, 8), 2.0)


def factories() -> Iterator[fx.Node]:
    options = {"dtype": F64, "device": "cpu"}
    x = randn(4, 8)
    yield case(aten.full.default, [4, 8], 3.0, **options)
    yield case(aten.full.default, [4, 8], 0.0, **options)
    yield case(aten.full.default, [4, 8], True, dtype=torch.bool)
    yield case(aten.zeros.default, [4, 8], **options)
    yield case(aten.ones.default, [4, 8], **options)
    yield case(aten.empty.memory_format, [4, 8], **options)
    yield case(aten.scalar_tensor.default, 0.0, **options)
    yield case(aten.scalar_tensor.default, float("-inf"), **options)
    yield case(aten.arange.start_step, 0, 8, 1)
    yield case(aten.eye.default, 4)
    yield case(aten.linspace.default, 0.0, 1.0, 8)
    yield case(aten.tril_indices.default, 4, 4)
    yield case(aten.triu_indices.default, 4, 4)
    yield case(aten.empty_strided.default, [4, 8], [8, 1], **options)
    yield case(aten.empty_permuted.default, [4, 8], [0, 1], **options)
    for op in (aten.zeros_like, aten.ones_like, aten.empty_like):
        yield case(op.default, x)
    yield case(aten.full_like.default, x, 0.0)
    yield case(aten.full_like.default, x, 2.0)
    for op in (aten.new_zeros, aten.new_ones, aten.new_empty):
        yield case(op.default, x, [4, 8])
        yield case(op.default, x, [8, 4, 4])
    yield case(aten.new_full.default, x, [8, 4], 2.0)
    yield case(aten.new_empty_strided.default, x, [4, 8], [8, 1])


def views() -> Iterator[fx.Node]:
    x = randn(4, 8, 16)
    shapes = ([32, 16], [4, 128], [4, 8, 4, 4], [4, 2, 4, 16], [512], [4, 8, 16], [1, 4, 8, 16], [2, 2, 8, 16])
    for shape in (*shapes, [4, 8, -1, 2]):
        yield case(aten.view.default, x, shape)
        yield case(aten._unsafe_view.default, x, shape)
    yield case(aten.view.default, randn(6, 4), [3, 8])
    yield case(aten.view.default, randn(12, 4), [3, 4, 4])
    yield case(aten.view.default, randn(1, 8), [8])
    yield case(aten.view.dtype, x, I64)
    yield case(aten.expand.default, randn(4, 1, 8), [4, 4, 8])
    yield case(aten.expand.default, randn(4, 1, 8), [-1, 4, -1])
    yield case(aten.expand.default, randn(8), [4, 8])
    yield case(aten.expand.default, randn(4, 1, 1), [8, 4, 1, 8])
    yield case(aten.t.default, randn(4, 8))
    yield case(aten.transpose.int, x, 1, -1)
    yield case(aten.permute.default, x, [2, 0, 1])
    yield case(aten.unsqueeze.default, x, 1)
    yield case(aten.unsqueeze.default, x, -1)
    yield case(aten.squeeze.default, randn(4, 1, 8))
    yield case(aten.squeeze.dim, randn(4, 1, 8), 1)
    yield case(aten.squeeze.dim, x, 0)
    yield case(aten.squeeze.dims, randn(4, 1, 8, 1), [1, 3])
    yield case(aten.detach.default, x)
    yield case(aten.alias.default, x)
    to_the_end = 2**63 - 1
    slices = ((1, 0, 4), (1, 4, 8), (-1, 0, to_the_end), (0, 0, 4), (0, 0, 4, 2), (1, -4, to_the_end), (1, 0, 7))
    for arguments in slices:
        yield case(aten.slice.Tensor, x, *arguments)
    yield case(aten.slice.Tensor, x)
    yield case(aten.select.int, x, 1, 3)
    yield case(aten.select.int, x, -1, 0)
    yield case(aten.split.Tensor, x, 4, 1)
    yield case(aten.split_with_sizes.default, x, [4, 12], -1)
    yield case(aten.unbind.int, x, 1)
    yield case(aten.diagonal.default, randn(4, 8, 8), 0, 1, 2)
    yield case(aten.unfold.default, x, 1, 4, 2)
    yield case(aten.as_strided.default, randn(4, 8).t(), [4, 4], [8, 1], 2)


def pieces() -> Iterator[fx.Node]:
    x, y = randn(4, 8), randn(4, 8)
    for dim in (0, 1, -1):
        yield case(aten.cat.default, [x, y], dim)
        yield case(aten.stack.default, [x, y], dim)
        yield case(aten.slice_backward.default, randn(4, 4, 8), [4, 4, 8], dim, 0, 4 if dim != -1 else 8, 1)
        yield case(aten.select_backward.default, randn(4, 4), [4, 4, 4], dim, 2)
        yield case(aten.cumsum.default, x, dim)
        yield case(aten.cumprod.default, x, dim)
        yield case(aten.select_scatter.default, randn(4, 4, 4), randn(4, 4), dim, 2)
    yield case(aten.cat.default, [x, randn(4, 4)], -1)
    yield case(aten.cat.default, [x, y])
    yield case(aten.slice_backward.default, randn(4, 4), [4, 8], -1, 4, 8, 1)
    yield case(aten.slice_backward.default, randn(4, 8), [8, 8], 0, 0, 4, 1)
    yield case(aten.slice_scatter.default, x, randn(4, 4), -1, 2, 6)
    yield case(aten.slice_scatter.default, x, randn(2, 8), 0, 0, 2)
    yield case(aten.constant_pad_nd.default, x, [0, 1], 0.0)
    yield case(aten.constant_pad_nd.default, randn(4, 4, 8), [0, 0, 1, 2], 1.5)
    yield case(aten.constant_pad_nd.default, ints(9, 4, 8), [0, 1], -100)
    yield case(aten.tril.default, randn(4, 8, 8))
    yield case(aten.triu.default, randn(8, 8), 1)
    yield case(aten.roll.default, x, [1], [1])
    yield case(aten.flip.default, x, [0])
    yield case(aten.repeat.default, x, [2, 1, 1])
    yield case(aten.repeat.default, x, [1, 2])


def indexing() -> Iterator[fx.Node]:
    x = randn(4, 8, 16)
    rows, columns = ints(4, 8), ints(8, 8)
    yield case(aten.index.Tensor, x, [rows])
    yield case(aten.index.Tensor, x, [None, columns])
    yield case(aten.index.Tensor, x, [rows, columns])
    yield case(aten.index.Tensor, x, [rows.view(8, 1), None, ints(16, 4)])
    yield case(aten.index.Tensor, x, [ints(4, 4, 1), ints(8, 1, 8)])
    yield case(aten.index_select.default, x, 1, ints(8, 4))
    for accumulate in (True, False):
        yield case(aten.index_put.default, x, [torch.tensor([0, 2, 1, 3])], randn(4, 8, 16), accumulate)
        yield case(aten.index_put.default, x, [None, torch.arange(4)], randn(4, 4, 16), accumulate)
    yield case(aten.index_put.default, x, [rows], randn(8, 8, 16), True)
    yield case(aten.gather.default, randn(4, 8), 1, ints(8, 4, 4))
    yield case(aten.gather.default, randn(8, 8), 1, ints(8, 4, 8))
    yield case(aten.gather.default, randn(8, 8), -2, ints(8, 4, 8))
    yield case(aten.scatter.src, randn(4, 8), 1, ints(8, 4, 1), randn(4, 1))
    yield case(aten.scatter.value, randn(4, 8), 1, ints(8, 4, 4), 1.0)
    yield case(aten.scatter_add.default, randn(4, 8), 1, ints(8, 4, 4), randn(4, 4))
    yield case(aten.scatter_add.default, randn(8, 8), 1, ints(8, 4, 4), randn(8, 8))
    yield case(aten.topk.default, x, 4, 1)
    yield case(aten.topk.default, x, 4)
    yield case(aten.sort.default, x, 1)


def reductions() -> Iterator[fx.Node]:
    x = randn(4, 8, 16)
    wholes = (aten.sum, aten.mean, aten.amax, aten.max, aten.min, aten.prod)
    for op in (packet.default for packet in wholes):
        yield case(op, x)
    for dims, keep in (([0], False), ([1], True), ([-1], False), ([0, 1], False), ([0, 1, 2], True)):
        for op in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.logsumexp.default):
            yield case(op, x, dims, keep)
    yield case(aten.sum.dim_IntList, ints(9, 4, 8), [0])
    yield case(aten.sum.default, mask(4, 8))
    yield case(aten.sum.dim_IntList, randn(4, 8, dtype=torch.float32), [0], dtype=F64)
    yield case(aten.prod.dim_int, x, 1)
    for op in (aten.max.dim, aten.min.dim):
        yield case(op, x, 1)
        yield case(op, x, -1, True)
    for op in (aten.all, aten.any):
        yield case(op.default, mask(4, 8))
        yield case(op.dim, mask(4, 8), 1)
    for op in (aten.var.correction, aten.std.correction, aten.var_mean.correction):
        yield case(op, x, [1])
        yield case(op, x, [0, 2], correction=1, keepdim=True)
    yield case(aten.linalg_vector_norm.default, x)
    yield case(aten.linalg_vector_norm.default, x, 2, [1])
    yield case(aten.linalg_vector_norm.default, x, 1, [-1])
    for op in (aten.argmax.default, aten.argmin.default):
        yield case(op, x)
        yield case(op, x, 1)
        yield case(op, x, -1, True)


def products() -> Iterator[fx.Node]:
    yield case(aten.mm.default, randn(4, 8), randn(8, 16))
    yield case(aten.mm.default, randn(8, 4).t(), randn(16, 8).t())
    yield case(aten.bmm.default, randn(4, 4, 8), randn(4, 8, 16))
    yield case(aten.dot.default, randn(8), randn(8))
    for bias in (randn(16), randn(4, 16), randn(1, 16), randn(4, 1), randn()):
        yield case(aten.addmm.default, bias, randn(4, 8), randn(8, 16))
    yield case(aten.addmm.default, randn(16), randn(4, 8), randn(8, 16), beta=2, alpha=0.5)
    for bias in (randn(4, 4, 16), randn(1, 1, 16)):
        yield case(aten.baddbmm.default, bias, randn(4, 4, 8), randn(4, 8, 16), beta=0.5)


def normalizations() -> Iterator[fx.Node]:
    x, w, b = randn(4, 8, 16), randn(16), randn(16)
    _, mean, rstd = aten.native_layer_norm(x, [16], w, b, 1e-5)
    yield case(aten.native_layer_norm.default, x, [16], w, b, 1e-5)
    yield case(aten.native_layer_norm.default, x, [16], None, None, 1e-5)
    yield case(aten.native_layer_norm.default, x, [8, 16], randn(8, 16), randn(8, 16), 1e-5)
    for wanted in ([True, True, True], [True, False, False], [False, True, True]):
        yield case(aten.native_layer_norm_backward.default, randn(4, 8, 16), x, [16], mean, rstd, w, b, wanted)
    yield case(aten._fused_rms_norm.default, x, [16], w, 1e-5)
    yield case(aten._fused_rms_norm.default, x, [16], None, 1e-5)
    rms = aten._fused_rms_norm(x, [16], w, 1e-5)[1]
    for wanted in ([True, True], [True, False]):
        yield case(aten._fused_rms_norm_backward.default, randn(4, 8, 16), x, [16], rms, w, wanted)
    for groups in (2, 4, 8):
        x = randn(4, 8, 4, 4)
        sizes = (4, 8, 16, groups)
        yield case(aten.native_group_norm.default, x, randn(8), randn(8), *sizes, 1e-5)
        yield case(aten.native_group_norm.default, x, None, None, *sizes, 1e-5)
        _, mean, rstd = aten.native_group_norm(x, randn(8), None, *sizes, 1e-5)
        for wanted in ([True, True, True], [True, False, False]):
            grad = randn(4, 8, 4, 4)
            yield case(aten.native_group_norm_backward.default, grad, x, mean, rstd, randn(8), *sizes, wanted)


def softmaxes() -> Iterator[fx.Node]:
    x, g = randn(4, 8, 16), randn(4, 8, 16)
    for dim in (-1, 1, 0):
        for forward, backward in (
            (aten._softmax.default, aten._softmax_backward_data.default),
            (aten._log_softmax.default, aten._log_softmax_backward_data.default),
        ):
            yield case(forward, x, dim, False)
            yield case(backward, g, forward(x, dim, False), dim, F64)
    low = randn(4, 16, dtype=torch.bfloat16)
    yield case(aten._log_softmax.default, low, 1, False)
    yield case(aten._softmax.default, low, 1, False)
    yield case(aten._safe_softmax.default, randn(4, 8, 16).masked_fill(mask(4, 8, 1), -math.inf), -1)


def losses() -> Iterator[fx.Node]:
    scores, targets, weight = randn(8, 16).log_softmax(-1), ints(16, 8), torch.rand(16, dtype=F64)
    targets[2] = -100
    targets[5] = 3
    for reduction in (0, 1, 2):
        for ignored in (-100, 3):
            for given in (None, weight):
                known = torch.where(targets == -100, torch.full_like(targets, ignored), targets)
                loss, total = aten.nll_loss_forward(scores, known, given, reduction, ignored)
                yield case(aten.nll_loss_forward.default, scores, known, given, reduction, ignored)
                rest = (scores, known, given, reduction, ignored, total)
                yield case(aten.nll_loss_backward.default, torch.randn_like(loss), *rest)
    yield case(aten.nll_loss_forward.default, randn(16), torch.tensor(9), None, 1, -100)
    image, labels = randn(4, 8, 4, 4), ints(8, 4, 4, 4)
    for reduction in (0, 1, 2):
        loss, total = aten.nll_loss2d_forward(image, labels, None, reduction, 5)
        yield case(aten.nll_loss2d_forward.default, image, labels, None, reduction, 5)
        yield case(aten.nll_loss2d_backward.default, torch.randn_like(loss), image, labels, None, reduction, 5, total)
        x, y = randn(4, 8), randn(4, 8)
        for forward, backward, extra in (
            (aten.mse_loss, aten.mse_loss_backward, ()),
            (aten.smooth_l1_loss, aten.smooth_l1_loss_backward, (0.7,)),
            (aten.huber_loss, aten.huber_loss_backward, (0.7,)),
        ):
            yield case(forward.default, x, y, reduction, *extra)
            yield case(backward.default, torch.randn_like(forward(x, y, reduction, *extra)), x, y, reduction, *extra)


def embeddings() -> Iterator[fx.Node]:
    weight = randn(16, 8)
    for indices in (ints(16, 4, 8), ints(16, 8), torch.tensor(9)):
        yield case(aten.embedding.default, weight, indices)
        grad = randn(*indices.shape, 8)
        for padding, by_frequency in ((-1, False), (3, False), (-1, True)):
            yield case(aten.embedding_dense_backward.default, grad, indices, 16, padding, by_frequency)
    yield case(aten.embedding.default, weight, ints(16, 4, 8), 3)


def randoms() -> Iterator[fx.Node]:
    yield case(aten.native_dropout.default, randn(4, 8), 0.5, True)
    yield case(aten.bernoulli.p, randn(4, 8), 0.5)
    yield case(aten.bernoulli.default, torch.rand(4, 8))
    yield case(aten.rand_like.default, randn(4, 8))
    yield case(aten.randn_like.default, randn(4, 8))
    yield case(aten.randint_like.low_dtype, randn(4, 8), -3, 9)
    yield case(aten.rand.default, [4, 8])
    yield case(aten.randn.default, [4, 8])
    yield case(aten.randint.low, -3, 9, [4, 8])
    yield case(aten.uniform.default, randn(4, 8), 2.0, 5.0)
    yield case(aten.normal_functional.default, randn(4, 8), 1.0, 2.0)
    yield case(aten.exponential.default, randn(4, 8), 3.0)
    yield case(aten.randperm.default, 8)
    yield case(aten.multinomial.default, torch.rand(4, 8), 2)


def moves_to_groups() -> Iterator[fx.Node]:
    source, ends = ints(8, 16), torch.tensor([2, 2, 9, 16])
    for x in (randn(8, 4), randn(8)):
        yield case(TO_GROUPS, x, source, ends)
    for rows in (randn(16, 4), randn(16)):
        yield case(FROM_GROUPS, rows, source, ends, 8)


GROUPS: dict[str, Callable[[], Iterator[fx.Node]]] = (
    {
        group.__name__: group
        for group in (
            elementwise,
            copies,
            backwards,
            factories,
            views,
            pieces,
            indexing,
            reductions,
            products,
            moves_to_groups,
            normalizations,
            softmaxes,
            losses,
            embeddings,
        )
    }
    | IMAGE_GROUPS
    | ATTENTION_GROUPS
)
