"""Where an op is linear, so that summands may pass: f(sum of x_r) = sum of f(x_r).

An entry lists groups of arguments. With all of a group in "P" and all other operands in
"R", running the op on the summands gives summands of the result. The op must be linear
in the group taken together, without a constant: x + 1 is not linear in x, x + y is in
(x, y); x * y is in x and in y, but not in both together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from autopar.placements import PARTIAL, shard
from autopar.rules.schema import OpCall, is_view
from autopar.rules.types import AxisRule

Group = tuple[str, ...]

_SELF: tuple[Group, ...] = (("self",),)
_GRAD: tuple[Group, ...] = (("grad_output",),)

LINEAR: dict[str, tuple[Group, ...]] = {
    # element by element
    "aten.neg": _SELF,
    "aten.clone": _SELF,
    "aten._to_copy": _SELF,
    "aten.lift_fresh_copy": _SELF,
    "prims.convert_element_type": (("a",),),
    "aten.add": (("self", "other"),),
    "aten.sub": (("self", "other"),),
    "aten.mul": (("self",), ("other",)),
    "aten.div": _SELF,
    "aten.where": (("self", "other"),),
    "aten.masked_fill": _SELF,
    "aten.copy": (("src",),),
    "aten.fill": (("value",),),
    # reductions, scans and selections
    "aten.sum": _SELF,
    "aten.mean": _SELF,
    "aten.cumsum": _SELF,
    "aten.tril": _SELF,
    "aten.triu": _SELF,
    "aten.cat": (("tensors",),),
    "aten.stack": (("tensors",),),
    "aten.constant_pad_nd": _SELF,
    "aten.roll": _SELF,
    "aten.flip": _SELF,
    "aten.repeat": _SELF,
    "aten.index": _SELF,
    "aten._unsafe_index": _SELF,
    "aten.index_add": (("self", "source"),),
    "aten.index_select": _SELF,
    "aten.gather": _SELF,
    "aten.index_put": (("self", "values"),),
    "aten._unsafe_index_put": (("self", "values"),),
    "aten.scatter_add": (("self", "src"),),
    "aten.slice_scatter": (("self", "src"),),
    "aten.select_scatter": (("self", "src"),),
    "aten.slice_backward": _GRAD,
    "aten.select_backward": _GRAD,
    "aten.embedding": (("weight",),),
    "aten.embedding_dense_backward": _GRAD,
    # products
    "aten.mm": (("self",), ("mat2",)),
    "aten.bmm": (("self",), ("mat2",)),
    "aten.addmm": (("self", "mat1"), ("self", "mat2")),
    "aten.baddbmm": (("self", "batch1"), ("self", "batch2")),
    "aten.mv": (("self",), ("vec",)),
    "aten._grouped_mm": (("self",), ("mat2",)),
    "transformers.grouped_mm_fallback": (("input",), ("weight",)),
    "transformers.grouped_mm_fallback_backward": _GRAD,
    "aten.pixel_shuffle": _SELF,
    "aten.pixel_unshuffle": _SELF,
    "aten.im2col": _SELF,
    "aten.col2im": _SELF,
    "aten.convolution": (("input", "bias"), ("weight", "bias")),
    "aten.avg_pool2d": _SELF,
    "aten._adaptive_avg_pool2d": _SELF,
    # derivatives are linear in the gradient that comes in
    "aten.gelu_backward": _GRAD,
    "aten.silu_backward": _GRAD,
    "aten.sigmoid_backward": _GRAD,
    "aten.tanh_backward": _GRAD,
    "aten.threshold_backward": _GRAD,
    "aten.softplus_backward": _GRAD,
    "aten.native_dropout_backward": _GRAD,
    **{
        f"aten.{name}_backward": _GRAD
        for name in ("elu", "leaky_relu", "hardswish", "hardsigmoid", "hardtanh", "mish", "log_sigmoid", "glu")
    },
    "aten.convolution_backward": _GRAD,
    "aten.avg_pool2d_backward": _GRAD,
    "aten._adaptive_avg_pool2d_backward": _GRAD,
    "aten.max_pool2d_with_indices_backward": _GRAD,
    "aten.upsample_nearest2d_backward": _GRAD,
    "aten.upsample_bilinear2d_backward": _GRAD,
    "aten.binary_cross_entropy_backward": _GRAD,
    "aten._softmax_backward_data": _GRAD,
    "aten._log_softmax_backward_data": _GRAD,
    "aten.nll_loss_backward": _GRAD,
    "aten.nll_loss2d_backward": _GRAD,
    "aten.mse_loss_backward": _GRAD,
    "aten.native_layer_norm_backward": (("grad_out",),),
    "aten.native_group_norm_backward": (("grad_out",),),
    "aten.native_batch_norm_backward": (("grad_out",),),
    "aten._weight_norm_interface_backward": (("grad_w",),),
    "aten._fused_rms_norm_backward": (("grad_out",),),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": (("grad_out",),),
    "autopar.block_attention_backward": (("grad_out",),),
}


def _scalar(name: str) -> Callable[[OpCall], bool]:
    """The op adds a constant unless this scalar argument is zero."""
    return lambda call: call.tensor(name) is None and not call.arg(name, 0)


# Entries above that only hold under a condition.
_CONDITIONS: dict[str, Callable[[OpCall], bool]] = {
    "aten.div": lambda call: call.arg("rounding_mode") is None,
    "aten.masked_fill": _scalar("value"),
    "aten.constant_pad_nd": _scalar("value"),
    "aten.fill": lambda call: call.tensor("value") is not None,
    # Where values collide without accumulation, one of them wins: linear only if the same wins on every rank.
    "aten.index_put": lambda call: bool(call.arg("accumulate")),
    "aten._unsafe_index_put": lambda call: bool(call.arg("accumulate")),
}


def linear_rules(call: OpCall) -> list[AxisRule]:
    """The rules that let summands pass through an op."""
    groups = LINEAR.get(call.name, ())
    if is_view(call.op):
        groups = ((call.op._schema.arguments[0].name,),)
    if not groups or not _CONDITIONS.get(call.name, lambda _: True)(call):
        return []
    found = []
    for group in groups:
        present = tuple(name for name in group if call.arg(name) is not None)
        slots = [slot for name in present for slot in call.slots.get(name, ())]
        if slots and all(call.slots.get(name) for name in present) and _keeps_precision(call, slots):
            found.append(call.rule(dict.fromkeys(present, PARTIAL), PARTIAL))
    return found


# Products that add a tensor: (that tensor, left, right), and the dims of left and right that are contracted.
_BIASED = {"aten.addmm": (("self", "mat1", "mat2"), (1, 0)), "aten.baddbmm": (("self", "batch1", "batch2"), (2, 1))}


def shared_bias_rules(call: OpCall) -> list[AxisRule]:
    """A product cut along the dim that it contracts gives summands; each rank adds its share of the bias.

    This is how a layer with a bias is row-parallel (Shoeybi et al. 2019 add it after the reduction instead).
    """
    if call.name not in _BIASED:
        return []
    (_, left, right), (last, first) = _BIASED[call.name]
    rule = call.rule({left: shard(last), right: shard(first)}, PARTIAL, "shared_bias")
    return [rule] if _keeps_precision(call, [0]) else []


def _keeps_precision(call: OpCall, slots: list[int]) -> bool:
    """Floating in, floating out, and no result narrower than a summand: rounding each summand would not be linear."""
    made = [t for t in call.outputs if t is not None]
    for source in (call.inputs[slot] for slot in slots):
        if not source.is_floating_point() or not all(t.is_floating_point() for t in made):
            return False
        if any(torch.promote_types(source.dtype, t.dtype) != t.dtype for t in made):
            return False
    if is_view(call.op):
        return all(t.dtype == call.inputs[0].dtype for t in made)
    return bool(made)
