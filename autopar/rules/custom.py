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


def elementwise_loss(call: OpCall) -> list[AxisRule]:
    """mse_loss and its like: without reduction element by element, else summands.

    A mean divides by the local count, hence "mean_partial".
    """
    whole = call.inputs[0].shape
    if any(t.shape != whole for t in call.inputs):
        return []
    reduction = call.arg("reduction", _MEAN)
    if reduction not in (_MEAN, _SUM):
        return elementwise(call)
    lowering = "mean_partial" if reduction == _MEAN else "local"
    rows = [(shard(d),) * len(call.inputs) for d in range(len(whole))]
    return [AxisRule(row, (PARTIAL,), lowering) for row in rows]


def elementwise_loss_backward(call: OpCall) -> list[AxisRule]:
    """As forward; the gradient that comes in is one number if the loss is."""
    elements = [t for t in call.inputs if t.dim()]
    if any(t.shape != call.out.shape for t in elements):
        return []
    rules = elementwise(call)
    if call.arg("reduction", _MEAN) != _MEAN:
        return rules
    return [AxisRule(r.inputs, r.outputs, "mean_partial") for r in rules]


# -- normalization -------------------------------------------------------------------------


def group_norm(call: OpCall) -> list[AxisRule]:
    """(input [N, C, *], weight [C], bias [C]) -> (out, mean [N, G], rstd [N, G]): cut samples, or whole groups."""
    return [
        call.rule({"input": shard(0)}, shard(0)),
        call.rule({"input": shard(1), "weight": shard(0), "bias": shard(0)}, shard(1)),
    ]


def group_norm_backward(call: OpCall) -> list[AxisRule]:
    """-> (grad_input, grad_weight [C], grad_bias [C])."""
    over = ("grad_out", "input", "mean", "rstd")
    samples: dict[str, Placement | None] = {**dict.fromkeys(over, shard(0))}
    channels: dict[str, Placement | None] = {**dict.fromkeys(over, shard(1)), "weight": shard(0)}
    return [
        call.rule(samples, (shard(0), PARTIAL, PARTIAL)),
        call.rule(channels, (shard(1), shard(0), shard(0))),
    ]


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


def scan(call: OpCall) -> list[AxisRule]:
    """cumsum and its like: every dim but the scanned one."""
    dim = normalized(call.arg("dim"), call.out.dim())
    return [call.rule({"self": shard(d)}, shard(d)) for d in range(call.out.dim()) if d != dim]


def gather(call: OpCall) -> list[AxisRule]:
    """(self, index): other dims together where their sizes agree; along its own dim any part of the index."""
    source, index = call.inputs
    dim = normalized(call.arg("dim"), source.dim())
    rules = [
        call.rule({"self": shard(d), "index": shard(d)}, shard(d))
        for d in range(index.dim())
        if d != dim and source.shape[d] == index.shape[d]
    ]
    # The result at an index position depends on that position only, as long as the other dims are whole.
    return [*rules, call.rule({"index": shard(dim)}, shard(dim))] if index.dim() else rules


def scatter(call: OpCall) -> list[AxisRule]:
    """scatter, scatter_add (self, index, src or value): dims other than its own, where all sizes agree."""
    sizes = [t.shape for t in call.inputs if t.dim()]
    dim = normalized(call.arg("dim"), call.out.dim())
    return [
        AxisRule(tuple(shard(d) if t.dim() else REPLICATE for t in call.inputs), (shard(d),))
        for d in range(call.out.dim())
        if d != dim and len({s[d] for s in sizes}) == 1
    ]


def constant_pad(call: OpCall) -> list[AxisRule]:
    """Dims that are not padded. `pad` counts from the last dim, two numbers each."""
    pad, rank = call.arg("pad"), call.out.dim()
    padded = {rank - 1 - i // 2 for i, width in enumerate(pad) if width}
    return [call.rule({"self": shard(d)}, shard(d)) for d in range(rank) if d not in padded]


CUSTOM: dict[str, RuleFunction] = {
    **ATTENTION,
    **VOCAB,
    **{f"aten.{n}": factory for n in ("full", "zeros", "ones", "empty", "scalar_tensor")},
    **{f"aten.{n}_like": factory_like for n in ("full", "zeros", "ones", "empty")},
    **{f"aten.new_{n}": factory_like for n in ("full", "zeros", "ones", "empty")},
    **{f"aten.{n}": no_rules for n in ("arange", "eye", "linspace", "tril_indices", "triu_indices", "empty_strided")},
    "aten.new_empty_strided": no_rules,
    "aten.as_strided": no_rules,  # it reads storage by strides
    "aten.empty_permuted": no_rules,
    "aten.fill": fill_tensor,
    "aten.masked_fill": elementwise,
    "aten.copy": elementwise,
    "aten.lift_fresh_copy": elementwise,
    "aten.softplus_backward": elementwise,
    **{f"aten.{n}": elementwise_loss for n in ("mse_loss", "smooth_l1_loss", "huber_loss")},
    **{f"aten.{n}_backward": elementwise_loss_backward for n in ("mse_loss", "smooth_l1_loss", "huber_loss")},
    "aten.native_group_norm": group_norm,
    "aten.native_group_norm_backward": group_norm_backward,
    "aten.addmm": addmm,
    "aten.baddbmm": baddbmm,
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
    "aten.cumsum": scan,
    "aten.cumprod": scan,
    "aten.gather": gather,
    "aten.scatter": scatter,
    "aten.scatter_add": scatter,
    "aten.constant_pad_nd": constant_pad,
}
