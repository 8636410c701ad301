"""Rules of our own: what DTensor lacks, or gets wrong when the same op runs on shards.

`CUSTOM` maps an op (without overload) to the function that lists its rules; for these
ops DTensor is not asked. The functions need not care whether dims divide, nor list the
replicated rule and the linear ones: `autopar.rules.registry` does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from autopar.placements import PARTIAL, REPLICATE, Placement, shard
from autopar.rules.attention import ATTENTION
from autopar.rules.groups import GROUPS
from autopar.rules.images import IMAGES
from autopar.rules.indexing import INDEXING
from autopar.rules.normalization import NORMALIZATION
from autopar.rules.schema import OpCall, aligned, normalized
from autopar.rules.types import AxisRule
from autopar.rules.vocab import VOCAB

RuleFunction = Callable[[OpCall], list[AxisRule]]


def elementwise(call: OpCall) -> list[AxisRule]:
    """One rule per dim of the result; operands broadcast."""
    rules = []
    for dim in range(call.out.dim()):
        cut = shard(dim)
        inputs = tuple(aligned(cut, t, call.out) for t in call.inputs)
        rules.append(AxisRule(inputs, tuple(None if t is None else cut for t in call.outputs)))
    return rules


def no_rules(call: OpCall) -> list[AxisRule]:
    """Known to run replicated only."""
    return []


# -- factories ---------------------------------------------------------------------------

_ZERO = ("zeros", "full", "scalar_tensor", "fill")


def _makes_zero(call: OpCall) -> bool:
    """Whether the result is all zeros of a floating dtype, hence also a summand."""
    stem = call.name.removeprefix("aten.").removeprefix("new_").removesuffix("_like")
    if stem not in _ZERO or not call.out.is_floating_point():
        return False
    value = next((call.arg(a) for a in ("fill_value", "value", "s") if call.arg(a) is not None), 0)
    return not isinstance(value, torch.Tensor) and not value


def factory(call: OpCall) -> list[AxisRule]:
    """A constant tensor can be made in any state; zeros also as summands."""
    placements = [shard(d) for d in range(call.out.dim())] + ([PARTIAL] if _makes_zero(call) else [])
    return [AxisRule((), (p,)) for p in placements]


def factory_like(call: OpCall) -> list[AxisRule]:
    """*_like, new_*, fill: the operand gives dtype and device, its shape unless there is a size, never its values."""
    source = call.inputs[0]
    made = [shard(d) for d in range(call.out.dim())] + ([PARTIAL] if _makes_zero(call) else [])
    if source.shape == call.out.shape:
        pairs = [(shard(d), shard(d)) for d in range(source.dim())]
    else:
        pairs = [(shard(d), REPLICATE) for d in range(source.dim())]
    has_size = "size" in call.named
    pairs += [(REPLICATE, p) for p in made if has_size or p == PARTIAL]
    if source.is_floating_point():
        pairs.append((PARTIAL, PARTIAL if _makes_zero(call) else REPLICATE))
    return [AxisRule((a, *(REPLICATE for _ in call.inputs[1:])), (b,)) for a, b in pairs]


def fill_tensor(call: OpCall) -> list[AxisRule]:
    """fill(self, value): with a tensor value it broadcasts that; else it is full_like."""
    return factory_like(call) if len(call.inputs) == 1 else elementwise(call)


# -- losses over all elements --------------------------------------------------------------

_MEAN, _SUM = 1, 2


def _is_by_element(call: OpCall, shape: torch.Size) -> bool:
    """Whether scores and targets have the same shape; weights may broadcast to it."""
    return all(t is None or t.shape == shape for t in (call.tensor("self"), call.tensor("target")))


def elementwise_loss(call: OpCall) -> list[AxisRule]:
    """mse_loss and its like: without reduction element by element, else summands.

    A mean divides by the local count, hence "mean_partial".
    """
    whole = call.inputs[0]
    if not _is_by_element(call, whole.shape):
        return []
    reduction = call.arg("reduction", _MEAN)
    if reduction not in (_MEAN, _SUM):
        return elementwise(call)
    lowering = "mean_partial" if reduction == _MEAN else "local"
    rows = [tuple(aligned(shard(d), t, whole) for t in call.inputs) for d in range(whole.dim())]
    return [AxisRule(row, (PARTIAL,), lowering) for row in rows]


def elementwise_loss_backward(call: OpCall) -> list[AxisRule]:
    """As forward; the gradient that comes in is one number if the loss is."""
    if not _is_by_element(call, call.out.shape):
        return []
    rules = elementwise(call)
    if call.arg("reduction", _MEAN) != _MEAN:
        return rules
    return [AxisRule(r.inputs, r.outputs, "mean_partial") for r in rules]


# -- products with a bias -------------------------------------------------------------------


def addmm(call: OpCall) -> list[AxisRule]:
    """(self, mat1 [M, K], mat2 [K, N]): rows, columns, or the contraction with the bias as a summand."""
    bias = call.inputs[0]

    def rule(mat1: Placement, mat2: Placement, out: Placement) -> AxisRule:
        return AxisRule((aligned(out, bias, call.out), mat1, mat2), (out,))

    rules = [rule(shard(0), REPLICATE, shard(0)), rule(REPLICATE, shard(1), shard(1))]
    if call.out.is_floating_point():
        rules.append(rule(shard(1), shard(0), PARTIAL))
    return rules


def baddbmm(call: OpCall) -> list[AxisRule]:
    """(self, batch1 [B, M, K], batch2 [B, K, N]): as addmm, and the batch."""
    bias = call.inputs[0]

    def rule(one: Placement, two: Placement, out: Placement) -> AxisRule:
        return AxisRule((aligned(out, bias, call.out), one, two), (out,))

    rules = [
        rule(shard(0), shard(0), shard(0)),
        rule(shard(1), REPLICATE, shard(1)),
        rule(REPLICATE, shard(2), shard(2)),
    ]
    if call.out.is_floating_point():
        rules.append(rule(shard(2), shard(1), PARTIAL))
    return rules


# -- slices ---------------------------------------------------------------------------------


def _whole(call: OpCall, size: int) -> bool:
    """Whether a slice takes all of a dim of `size`."""
    start, end, step = call.arg("start") or 0, call.arg("end"), call.arg("step") or 1
    return start in (0, -size) and (end is None or end >= size) and step == 1


def slice_view(call: OpCall) -> list[AxisRule]:
    """slice keeps every cut but that of its own dim, unless it takes all of it."""
    source = call.inputs[0]
    dim = normalized(call.arg("dim"), source.dim())
    kept = [d for d in range(source.dim()) if d != dim or _whole(call, source.shape[d])]
    return [call.rule({"self": shard(d)}, shard(d)) for d in kept]


def slice_backward(call: OpCall) -> list[AxisRule]:
    """The same, for the gradient."""
    rank = call.out.dim()
    dim = normalized(call.arg("dim"), rank)
    return [
        call.rule({"grad_output": shard(d)}, shard(d))
        for d in range(rank)
        if d != dim or _whole(call, call.out.shape[d])
    ]


def slice_scatter(call: OpCall) -> list[AxisRule]:
    """(self, src): every dim but the slice's own."""
    rank = call.out.dim()
    dim = normalized(call.arg("dim"), rank)
    return [call.rule({"self": shard(d), "src": shard(d)}, shard(d)) for d in range(rank) if d != dim]


def select(call: OpCall) -> list[AxisRule]:
    """select drops a dim; the dims behind it move up."""
    rank = call.inputs[0].dim()
    dim = normalized(call.arg("dim"), rank)
    return [call.rule({"self": shard(d)}, shard(d - (d > dim))) for d in range(rank) if d != dim]


def select_backward(call: OpCall) -> list[AxisRule]:
    """The other way round."""
    rank = call.out.dim()
    dim = normalized(call.arg("dim"), rank)
    return [call.rule({"grad_output": shard(d - (d > dim))}, shard(d)) for d in range(rank) if d != dim]


def select_scatter(call: OpCall) -> list[AxisRule]:
    """(self, src): src lacks the selected dim."""
    rank = call.out.dim()
    dim = normalized(call.arg("dim"), rank)
    return [call.rule({"self": shard(d), "src": shard(d - (d > dim))}, shard(d)) for d in range(rank) if d != dim]


def cat(call: OpCall) -> list[AxisRule]:
    """Every dim but the one along which it glues. Legacy empty 1-D operands stay whole."""
    rank = call.out.dim()
    dim = normalized(call.arg("dim", 0), rank)
    if any(t.dim() != rank for t in call.inputs):
        return []
    return [call.rule({"tensors": shard(d)}, shard(d)) for d in range(rank) if d != dim]


def stack(call: OpCall) -> list[AxisRule]:
    """Every dim of the operands; those behind the new one move down."""
    rank = call.out.dim()
    dim = normalized(call.arg("dim", 0), rank)
    return [call.rule({"tensors": shard(d - (d > dim))}, shard(d)) for d in range(rank) if d != dim]


def unfold(call: OpCall) -> list[AxisRule]:
    """unfold makes windows of a dim, in a new last dim; the other dims stay."""
    dim = normalized(call.arg("dimension"), call.inputs[0].dim())
    return [call.rule({"self": shard(d)}, shard(d)) for d in range(call.inputs[0].dim()) if d != dim]


def triangle(call: OpCall) -> list[AxisRule]:
    """tril, triu: batch dims only, for the diagonal runs through the last two."""
    return [call.rule({"self": shard(d)}, shard(d)) for d in range(call.out.dim() - 2)]


def other_dims(call: OpCall) -> list[AxisRule]:
    """Ops that mix the numbers along one dim (cumsum, glu, sort): every dim but that."""
    rank = call.out.dim()
    dim = normalized(call.arg("dim"), rank)
    if any(t is not None and t.dim() != rank for t in (*call.inputs, *call.outputs)):
        return []
    made = [tuple(None if t is None else shard(d) for t in call.outputs) for d in range(rank)]
    return [AxisRule((shard(d),) * len(call.inputs), made[d]) for d in range(rank) if d != dim]


def matrix_vector(call: OpCall) -> list[AxisRule]:
    """mv (self [M, K], vec [K]): rows, or the contraction."""
    return [call.rule({"self": shard(0)}, shard(0)), call.rule({"self": shard(1), "vec": shard(0)}, PARTIAL)]


def _row_units(call: OpCall, size: int) -> int:
    """Of how many units the rows of a grouped product's operand consist: torch's kernel takes whole 16 bytes."""
    if call.name != "aten._grouped_mm":
        return 0
    return max(1, size * call.inputs[0].element_size() // 16)


def grouped_product(call: OpCall) -> list[AxisRule]:
    """Products with a matrix per group of rows, offs [G] being where the groups end.

    self [T, K] x mat2 [G, K, N] -> [T, N]: columns, the contraction, or rows (their lowering counts the ends from
    the start of a rank's rows). [M, T] x [T, N] -> [G, M, N], groups of summands: likewise.
    """
    (left, left_name), (right, right_name) = zip(call.inputs[:2], call.slots, strict=False)
    if call.tensor("bias") is not None or call.tensor("offs") is None:
        return []
    if left.dim() == 2 and right.dim() == 3:
        return [
            call.rule({right_name: shard(2)}, shard(1), units=_row_units(call, right.shape[2])),
            call.rule({left_name: shard(1), right_name: shard(1)}, PARTIAL, units=_row_units(call, left.shape[1])),
            call.rule({left_name: shard(0)}, shard(0), "grouped_rows"),
        ]
    if left.dim() == right.dim() == 2:
        return [
            call.rule({left_name: shard(0)}, shard(1), units=_row_units(call, left.shape[0])),
            call.rule({right_name: shard(1)}, shard(2), units=_row_units(call, right.shape[1])),
            call.rule({left_name: shard(1), right_name: shard(0)}, PARTIAL, "grouped_rows"),
        ]
    return []


def grouped_product_backward(call: OpCall) -> list[AxisRule]:
    """Of transformers' own grouped product (input [T, K], weight [G, K, N], offs, grad_output [T, N])."""
    rows = {"input": shard(0), "grad_output": shard(0)}
    return [
        call.rule({**rows}, (shard(0), PARTIAL), "grouped_rows"),
        call.rule({"weight": shard(2), "grad_output": shard(1)}, (PARTIAL, shard(2))),
        call.rule({"input": shard(1), "weight": shard(1)}, (shard(1), shard(1))),
    ]


def constant_pad(call: OpCall) -> list[AxisRule]:
    """Dims that are not padded. `pad` counts from the last dim, two numbers each."""
    pad, rank = call.arg("pad"), call.out.dim()
    padded = {rank - 1 - i // 2 for i, width in enumerate(pad) if width}
    return [call.rule({"self": shard(d)}, shard(d)) for d in range(rank) if d not in padded]


# Element by element, but not marked so in torch (or not for all their results).
ELEMENTWISE = (
    "masked_fill", "copy", "lift_fresh_copy", "softplus_backward", "elu_backward", "leaky_relu_backward",
    "hardswish", "hardswish_backward", "hardsigmoid_backward", "hardtanh_backward", "hardshrink_backward",
    "softshrink_backward", "log_sigmoid_forward", "log_sigmoid_backward", "mish_backward", "logit_backward",
    "_prelu_kernel", "_prelu_kernel_backward", "floor_divide",
)  # fmt: skip
LOSSES = ("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "binary_cross_entropy")

CUSTOM: dict[str, RuleFunction] = {
    **ATTENTION,
    **VOCAB,
    **IMAGES,
    **NORMALIZATION,
    **INDEXING,
    **GROUPS,
    **{f"aten.{n}": factory for n in ("full", "zeros", "ones", "empty", "scalar_tensor")},
    **{f"aten.{n}_like": factory_like for n in ("full", "zeros", "ones", "empty")},
    **{f"aten.new_{n}": factory_like for n in ("full", "zeros", "ones", "empty")},
    **{f"aten.{n}": no_rules for n in ("arange", "eye", "linspace", "tril_indices", "triu_indices", "empty_strided")},
    "aten.new_empty_strided": no_rules,
    "aten.as_strided": no_rules,  # it reads storage by strides
    "aten.empty_permuted": no_rules,
    "aten.fill": fill_tensor,
    **{f"aten.{name}": elementwise for name in ELEMENTWISE},
    **{f"aten.{name}": elementwise_loss for name in LOSSES},
    "aten.binary_cross_entropy_with_logits": elementwise_loss,
    **{f"aten.{name}_backward": elementwise_loss_backward for name in LOSSES},
    "aten.addmm": addmm,
    "aten.baddbmm": baddbmm,
    "aten.mv": matrix_vector,
    "aten._grouped_mm": grouped_product,
    "transformers.grouped_mm_fallback": grouped_product,
    "transformers.grouped_mm_fallback_backward": grouped_product_backward,
    "aten.slice": slice_view,
    "aten.slice_backward": slice_backward,
    "aten.slice_scatter": slice_scatter,
    "aten.select": select,
    "aten.select_backward": select_backward,
    "aten.select_scatter": select_scatter,
    "aten.cat": cat,
    "aten.stack": stack,
    "aten.unfold": unfold,
    "aten.tril": triangle,
    "aten.triu": triangle,
    **{f"aten.{n}": other_dims for n in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")},
    **{f"aten.{n}": other_dims for n in ("_safe_softmax", "glu", "glu_backward")},
    "aten.constant_pad_nd": constant_pad,
}
