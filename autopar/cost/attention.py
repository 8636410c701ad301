"""Seconds of fused attention (FlashAttention-2 and its kin) by shape, forward and backward apart.

    seconds = pairs x (rate at width 128) x (softmax + products by width) x (causal waste) + bytes not hidden

* FLOPs as published: 4 x pairs x width forward, 2.5 times that backward; causal attention counts half of the pairs.
* Beside the products there is the softmax, whose work per pair does not shrink with the width of a head: at width 128
  it is 0.155 of the time, at 64 it weighs twice as much. Kernels exist for some widths; others are padded.
* A causal kernel computes whole blocks on the diagonal, and its last blocks run alone: 1.07 + 145 / keys.
* Of the bytes of query, key, value and result (8 tensors backward), the forward pass hides about half behind its
  products. The backward pass takes a pass more over them, for row sums, and to add up the gradient of the query.

These five figures and the four rates (A100 and H100, forward and backward) were fitted to FlashAttention-2's own
benchmark (Dao 2023; assets/flash2_{a100,h100}_fwd_bwd_benchmark.png: 47 points of width 64 and 128, 512 to 16 K tokens)
and to its forward pass on H100 in FlashAttention-3's (Shah et al. 2024, 12 points); all are within 5 %, see
`tests/cost/test_attention.py`.

The time never falls when batch, heads, queries, keys or width grow. Curves of `autopar profile` go before this law,
but for the launch, which is not in the figures here.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from autopar.cost.dtypes import itemsize
from autopar.cost.gemm import Seconds, Sizes
from autopar.curves import AttentionRate
from autopar.hardware import DeviceSpec

_WIDTHS = np.array([32, 64, 96, 128, 160, 192, 224, 256], dtype=np.float64)  # that FlashAttention-2 has kernels for
_SOFTMAX_SHARE = 0.155  # of the time at width 128
_CAUSAL_FACTOR, _CAUSAL_TOKENS = 1.07, 145.0
_FORWARD_BYTES, _BACKWARD_BYTES = 0.54, 1.22  # shares of the operands' bytes that are not hidden
_BACKWARD_FLOPS = 2.5  # times those of the forward pass


@lru_cache(maxsize=1 << 14)
def attention_time_s(
    device: DeviceSpec,
    batch: float,
    heads: float,
    queries: float,
    keys: float,
    width: float,
    dtype: str,
    *,
    causal: bool,
    backward: bool,
    kv_heads: float | None = None,
) -> float:
    """`attention_times_s` of one shape."""
    return float(
        attention_times_s(
            device, batch, heads, queries, keys, width, dtype, causal=causal, backward=backward, kv_heads=kv_heads
        )
    )


def attention_times_s(
    device: DeviceSpec,
    batch: Sizes,
    heads: Sizes,
    queries: Sizes,
    keys: Sizes,
    width: Sizes,
    dtype: str,
    *,
    causal: bool,
    backward: bool,
    kv_heads: Sizes | None = None,
) -> Seconds:
    """Seconds of the kernels alone, no launch, of sizes that broadcast against each other.

    batch: sequences. heads: of the queries; kv_heads: of keys and values, as many unless said otherwise.
    """
    shared = heads if kv_heads is None else kv_heads
    sizes = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64) for x in (batch, heads, queries, keys, width, shared))
    )
    if not (np.isfinite(np.prod(sizes, axis=0)).all() and min(size.min(initial=0.0) for size in sizes) >= 0):
        raise ValueError("the sizes of an attention must be finite numbers of at least 0")
    b, h, q, k, d, kv = sizes
    flops = 4.0 * b * h * q * k * d * (0.5 if causal else 1.0) * (_BACKWARD_FLOPS if backward else 1.0)
    moved = itemsize(dtype) * (2.0 * b * h * q * d + 2.0 * b * kv * k * d) * (2.0 if backward else 1.0)
    measured = device.measured.attention_rate("backward" if backward else "forward", dtype)
    if measured is not None:
        return _measured_s(measured, flops, moved, device)
    fraction = device.attention_backward_fraction if backward else device.attention_forward_fraction
    full_s = flops / (device.peak_flops(dtype) * (fraction or device.attention_efficiency_fraction))
    waste = _CAUSAL_FACTOR + _CAUSAL_TOKENS / np.maximum(k, 1.0) if causal else 1.0
    hidden = _BACKWARD_BYTES if backward else _FORWARD_BYTES
    memory_s = moved / (device.memory_bytes_per_s * device.memory_efficiency_fraction)
    return np.asarray(full_s * _by_width(d) * waste + hidden * memory_s)


def _by_width(width: Seconds) -> Seconds:
    """How much longer a FLOP takes than at width 128."""
    width = np.maximum(width, 1.0)
    known = np.searchsorted(_WIDTHS, width)
    padded = np.where(known < len(_WIDTHS), _WIDTHS[np.minimum(known, len(_WIDTHS) - 1)], width)
    return np.asarray(((1 - _SOFTMAX_SHARE) * padded + _SOFTMAX_SHARE * 128.0) / width)


def _measured_s(rate: AttentionRate, flops: Seconds, moved: Seconds, device: DeviceSpec) -> Seconds:
    overhead_s = max(rate.overhead_s - device.launch_overhead_s, 0.0)
    return np.asarray(overhead_s + flops / rate.flops_per_s + moved / rate.bytes_per_s)
