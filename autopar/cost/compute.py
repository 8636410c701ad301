"""What one op costs on one device: its class, its FLOPs, its time.

The time is a roofline with a launch floor,

    launch + max(compute, memory)      in general
    launch + compute + memory          for attention

    compute = flops / (peak x efficiency) + ramp        (with flops: matmul, convolution; no ramp for attention)
    memory  = bytes / (bandwidth x efficiency)

The ramp makes a matmul's efficiency rise with its size and saturate: with
f_half = ramp x peak x efficiency it is efficiency x flops / (flops + f_half). It stands
for filling and draining the device.

Attention adds up because that is what FlashAttention-2's published throughput does: on
A100, head dim 128, 16 K tokens, forward + backward, 205 TFLOP/s and a sum give 173, 187,
196, 201, 204 TFLOP/s at 1 K to 16 K tokens a sequence; measured 173, 187, 196, 201, 203.

A device that was measured has curves (`autopar.curves`), which go before this law: seconds by FLOPs for a matmul or
a convolution, but never less than the memory takes; seconds by bytes for all others, of the op itself or of its class;
rates of its own for attention.

The functions are continuous and never fall when flops or bytes grow.
"""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from autopar._torch_compat import OpOverload
from autopar.cluster import DeviceSpec


class OpClass(enum.Enum):
    """What bounds an op."""

    MATMUL = "matmul"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"
    ELEMENTWISE = "elementwise"
    REDUCTION = "reduction"
    VIEW = "view"  # no work at all
    RANDOM = "random"
    OTHER = "other"  # gathers, scatters, sorts: bound by memory


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MATMULS = _names(
    "mm addmm bmm baddbmm matmul linear mv dot vdot addmv addbmm addr _scaled_mm _grouped_mm _scaled_grouped_mm "
    "grouped_mm_fallback grouped_mm_fallback_backward"
)
_REDUCTIONS = _names(  # those that carry no reduction tag in torch: normalizations, softmax, losses
    "_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data native_layer_norm "
    "native_layer_norm_backward _fused_rms_norm _fused_rms_norm_backward native_group_norm "
    "native_group_norm_backward native_batch_norm native_batch_norm_backward _native_batch_norm_legit_functional "
    "batch_norm_backward nll_loss_forward nll_loss2d_forward mse_loss var var_mean std logsumexp norm "
    "linalg_vector_norm cumsum cumprod max_pool2d_with_indices avg_pool2d"
)
_ELEMENTWISE = _names(  # copies and factories, which carry no pointwise tag in torch
    "_to_copy to copy clone contiguous lift_fresh_copy fill full full_like zeros zeros_like ones ones_like empty "
    "empty_like new_zeros new_ones new_full new_empty scalar_tensor arange cat stack nll_loss_backward "
    "nll_loss2d_backward mse_loss_backward constant_pad_nd slice_backward select_backward"
)
_FREE = _names("_unsafe_view _reshape_alias lift_fresh")  # views that do not say so in their schema


@cache
def op_class(target: Any) -> OpClass:
    """The class of a node's target. Anything that is no ATen op is OTHER, but getitem is a VIEW."""
    if target is operator.getitem:
        return OpClass.VIEW
    if not isinstance(target, OpOverload):
        return OpClass.OTHER
    name = _base_name(target)
    if "attention" in name:
        return OpClass.ATTENTION
    if name in _MATMULS:
        return OpClass.MATMUL
    if "convolution" in name or name == "_slow_conv2d_forward":
        return OpClass.CONVOLUTION
    if (target.is_view or name in _FREE) and name not in _ELEMENTWISE:  # "to" says it is a view, but may copy
        return OpClass.VIEW
    if torch.Tag.reduction in target.tags or name in _REDUCTIONS:
        return OpClass.REDUCTION
    if torch.Tag.nondeterministic_seeded in target.tags:
        return OpClass.RANDOM
    if torch.Tag.pointwise in target.tags or name in _ELEMENTWISE:
        return OpClass.ELEMENTWISE
    return OpClass.OTHER


def op_flops(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out_val: Any) -> int:
    """Floating point operations of one call, a multiply-add counted as two; 0 for ops without matmuls.

    Tensors may be fake or meta. torch's own counters (torch.utils.flop_counter) serve where
    they exist. Scaled dot product attention has formulas of its own here, which know the CPU
    ops and grouped queries, and count causal attention as the half that is computed.
    """
    if not isinstance(target, OpOverload):
        return 0
    formula = _FORMULAS.get(_base_name(target))
    if formula is not None:
        return formula(target, args, kwargs)
    counter = flop_registry.get(target.overloadpacket)
    return 0 if counter is None else int(counter(*args, **kwargs, out_val=out_val))


@lru_cache(maxsize=1 << 16)
def op_time_s(device: DeviceSpec, kind: OpClass, flops: float, bytes_moved: float, dtype: str, name: str = "") -> float:
    """Seconds of one op, see the module docstring. dtype: of the operands, as in "bfloat16". name: see `op_name`."""
    if not (0 <= flops < math.inf and 0 <= bytes_moved < math.inf):
        raise ValueError(f"flops={flops}, bytes_moved={bytes_moved}; give finite numbers of at least 0")
    if kind is OpClass.VIEW:
        return 0.0
    measured_s = _measured_s(device, kind, flops, bytes_moved, dtype, name)
    return _law_s(device, kind, flops, bytes_moved, dtype) if measured_s is None else measured_s


def _measured_s(
    device: DeviceSpec, kind: OpClass, flops: float, bytes_moved: float, dtype: str, name: str
) -> float | None:
    """Seconds by the curves of the device; None where it has none for this op."""
    if kind is OpClass.ATTENTION:
        rate = device.measured.attention_rate("backward" if "backward" in name else "forward", dtype)
        if rate is None:
            return None
        return rate.overhead_s + flops / rate.flops_per_s + bytes_moved / rate.bytes_per_s
    if kind in (OpClass.MATMUL, OpClass.CONVOLUTION):
        curve = device.measured.curve((name, kind.value), (dtype,))
        if curve is None:
            return None
        return max(curve.seconds(flops), _streaming_s(device, bytes_moved, dtype))
    # By bytes, so that the curve of another dtype will do.
    curve = device.measured.curve((name, kind.value), (dtype, "float32"))
    return None if curve is None else curve.seconds(bytes_moved)


def _streaming_s(device: DeviceSpec, bytes_moved: float, dtype: str) -> float:
    """Seconds to read and write these bytes."""
    curve = device.measured.curve((OpClass.ELEMENTWISE.value,), (dtype, "float32"))
    if curve is None:
        return bytes_moved / (device.memory_bytes_per_s * device.memory_efficiency_fraction)
    return curve.seconds(bytes_moved)


def _law_s(device: DeviceSpec, kind: OpClass, flops: float, bytes_moved: float, dtype: str) -> float:
    memory_s = bytes_moved / (device.memory_bytes_per_s * device.memory_efficiency_fraction)
    if kind is OpClass.ATTENTION:
        compute_s = flops / (device.peak_flops(dtype) * device.attention_efficiency_fraction)
        return device.launch_overhead_s + compute_s + memory_s
    compute_s = 0.0
    if kind in (OpClass.MATMUL, OpClass.CONVOLUTION):
        rate = device.peak_flops(dtype) * device.matmul_efficiency_fraction
        compute_s = flops / rate + device.matmul_ramp_s
    elif flops:
        compute_s = flops / device.peak_flops(dtype)
    return device.launch_overhead_s + max(compute_s, memory_s)


# -- FLOPs where torch has no counter ------------------------------------------------


def op_name(target: Any) -> str:
    """ "mm" of aten::mm.default; "" of what is no op."""
    return _base_name(target) if isinstance(target, OpOverload) else ""


def _base_name(target: OpOverload) -> str:
    return target._schema.name.split("::")[-1]


def _argument(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """The value of an argument by the name it has in the schema, its default if not passed."""
    for position, argument in enumerate(target._schema.arguments):
        if argument.name == name:
            if position < len(args) and not argument.kwarg_only:
                return args[position]
            return kwargs.get(name, argument.default_value)
    return None


def _attention_flops(matmuls: tuple[int, int]) -> Callable[..., int]:
    """Counts `matmuls` = (over the key's width, over the value's width) products of [queries, keys].

    Forward: scores and output. Backward: scores again, gradients of value, probabilities,
    query and key (FlashAttention, Dao et al. 2022).
    """

    def count(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        query, key, value = (_argument(target, args, kwargs, name) for name in ("query", "key", "value"))
        batch, heads, queries, width = query.shape
        keys, value_width = key.shape[2], value.shape[3]
        pairs = int(batch) * int(heads) * int(queries) * int(keys)
        if _argument(target, args, kwargs, "is_causal") and queries == keys:
            seen = min(_argument(target, args, kwargs, "window") or int(keys), int(keys))  # by the last query
            pairs = pairs * seen * (2 * int(keys) - seen + 1) // (2 * int(keys) ** 2)
        return 2 * pairs * (matmuls[0] * int(width) + matmuls[1] * int(value_width))

    return count


def _product_flops(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """matmul, mv, dot and their kin: `left` [..., m, k] times `right` [..., k, n], or vectors."""
    left, right = args[-2:] if target._schema.name.split("::")[-1] in ("addmv", "addbmm") else args[:2]
    if right.dim() == 1:
        return 2 * int(left.numel())
    columns = int(right.shape[-1])
    if left.dim() <= 2 < right.dim():  # the left operand is used again for each matrix of the right one
        return 2 * int(right.numel()) * (int(left.shape[0]) if left.dim() == 2 else 1)
    return 2 * int(left.numel()) * columns


def _linear_flops(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """`input` [..., k] times the transpose of `weight` [n, k]."""
    return 2 * int(args[0].numel()) * int(args[1].shape[0])


def _grouped_flops(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Grouped matmul: whichever dims are ragged, each row, column or summand belongs to one group."""
    left, right = args[:2]
    groups = int(left.shape[0]) if left.dim() == right.dim() == 3 else 1
    return 2 * groups * int(left.shape[-2]) * int(left.shape[-1]) * int(right.shape[-1])


_ATTENTIONS = (
    "flash_attention",
    "flash_attention_for_cpu",
    "efficient_attention",
    "cudnn_attention",
    "fused_attention_overrideable",
)
_FORMULAS: dict[str, Callable[[OpOverload, Sequence[Any], Mapping[str, Any]], int]] = {
    **{f"_scaled_dot_product_{name}": _attention_flops((1, 1)) for name in _ATTENTIONS},
    **{f"_scaled_dot_product_{name}_backward": _attention_flops((3, 2)) for name in _ATTENTIONS},
    "block_attention": _attention_flops((1, 1)),
    "block_attention_backward": _attention_flops((3, 2)),
    **dict.fromkeys(("matmul", "mv", "dot", "vdot", "addmv", "addbmm"), _product_flops),
    "linear": _linear_flops,
    "_grouped_mm": _grouped_flops,
    "grouped_mm_fallback": _grouped_flops,
}
