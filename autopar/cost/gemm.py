"""Seconds of a matrix product by its shape: [m, k] times [k, n], `batch` times, on a device with a GPU's structure.

A library cuts the result into tiles, one multiprocessor computes one tile at a time, and the kernel is as slow as the
last wave of tiles is. For each kernel that it might take,

    tiles   = batch x ceil(m / tile's m) x ceil(n / tile's n) x pieces of k
    wave    = FLOPs of a tile / (rate of one multiprocessor x efficiency of the tile) + matmul_wave_s
    compute = ceil(tiles / multiprocessors) x wave + the cost of adding up the pieces

    seconds = matmul_start_s + max(least compute, memory, FLOPs / sustained rate)

rate of one multiprocessor = peak x matmul_burst_fraction / multiprocessors; the sustained rate, peak x
matmul_efficiency_fraction, is what power and heat allow for as long as a step lasts: idle multiprocessors leave the
others more of it, which is why it binds the product as a whole and not its waves.

The tiles are those of cuBLAS and CUTLASS. Their relative efficiencies, and the cost of cutting k, were fitted together
with the H100's burst, start and wave to 97 products in bfloat16 (1 to 4 of 256 to 4,096 each way) in XLA's table
for sm_90 (xla/service/gpu/model/matmul_interpolator_data.h, 2025): median error 3 %, at most 16 %. The sustained rates
are those of Vidur's profiles of Llama 2 on A100 and H100 (Agrawal et al. 2024; data/profiling/compute): 60 products,
median error 2 %, at most 14 %. `tests/cost/test_gemm.py` holds the model to a sample of both.

Holds exactly: the time never falls when m, n, k or batch grow, because it does not for any kernel; and a product of no
elements is free. It steps with m and n (whole tiles) and k (whole steps of the main loop).

Not so for batches of narrow operands (below float32) whose rows are not whole multiples of 16 bytes: libraries then
take kernels with the smallest tiles, which do for any alignment, at a share of the peak (`_UNALIGNED`). One such
product alone is priced as if it were aligned: what makes one is the vocabulary, which frameworks pad.

A device whose `multiprocessors` are unknown goes by FLOPs and bytes alone, one whose products were measured by its
curve; both without the launch, which is not in the figures here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from autopar.cost.dtypes import itemsize
from autopar.curves import OpCurve
from autopar.hardware import DeviceSpec

Sizes: TypeAlias = npt.ArrayLike
Seconds: TypeAlias = npt.NDArray[np.float64]

_TILES = (  # m, n, efficiency relative to the largest
    (256, 128, 1.0),
    (128, 256, 1.0),
    (128, 128, 0.95),
    (128, 64, 0.78),
    (64, 128, 0.78),
    (64, 64, 0.70),
)
_PIECES = (1, 2, 3, 4, 6, 8)  # of k, each on a multiprocessor of its own, added up at the end
_TILE_AXES = tuple(np.array(column, np.float64)[:, None] for column in zip(*_TILES, strict=True))  # [tiles, 1] each
_PIECE_AXIS = np.array(_PIECES, np.float64)[None]  # [1, pieces]
_STEP = 64  # of k, that the main loop takes at a time
_PIECES_S = 2e-6  # a second pass over the result
# From the runs of BigScience on A100 (benchmarks/data/runs.json) with heads of 108 numbers, against those with 112 and
# 144: the products of attention take 10 to 15 times longer there.
_UNALIGNED = 0.05
_CACHE_SPEEDUP = 2.5  # the pieces of the result stay in the second-level cache, which is so much faster than memory


@lru_cache(maxsize=1 << 16)
def gemm_time_s(device: DeviceSpec, m: float, n: float, k: float, batch: float, dtype: str) -> float:
    """Seconds of the kernel alone, no launch. dtype: of operands and result, as in "bfloat16"."""
    return float(gemm_times_s(device, m, n, k, batch, dtype))


def gemm_times_s(device: DeviceSpec, m: Sizes, n: Sizes, k: Sizes, batch: Sizes, dtype: str) -> Seconds:
    """`gemm_time_s` of arrays of sizes that broadcast against each other."""
    m, n, k, batch = np.broadcast_arrays(*(np.asarray(size, dtype=np.float64) for size in (m, n, k, batch)))
    if not (np.isfinite(m * n * k * batch).all() and min(x.min(initial=0.0) for x in (m, n, k, batch)) >= 0):
        raise ValueError("the sizes of a matrix product must be finite numbers of at least 0")
    flops = 2.0 * batch * m * n * k
    moved = itemsize(dtype) * batch * (m * k + k * n + m * n)
    memory_s = moved / (device.memory_bytes_per_s * device.memory_efficiency_fraction)
    curve = device.measured.curve(("mm", "matmul"), (dtype,))
    if curve is not None:
        seconds = np.maximum(_curve_s(curve, flops) - device.launch_overhead_s, memory_s)
    else:
        sustained_s = flops / (device.peak_flops(dtype) * device.matmul_efficiency_fraction)
        if device.multiprocessors:
            compute_s = np.maximum(_tiled_s(device, m, n, k, batch, dtype), sustained_s)
            slow = (batch > 1) & ~_aligned(n, k, dtype)
            compute_s = np.maximum(compute_s, np.where(slow, flops / (device.peak_flops(dtype) * _UNALIGNED), 0.0))
            seconds = device.matmul_start_s + np.maximum(compute_s, memory_s)
        else:
            seconds = np.maximum(sustained_s + device.matmul_ramp_s, memory_s)
    return np.where(batch * m * n > 0, seconds, 0.0)


def _aligned(n: Seconds, k: Seconds, dtype: str) -> npt.NDArray[np.bool_]:
    """Whether rows of n and of k numbers are whole multiples of 16 bytes; wide types have kernels for any."""
    wide = np.full(n.shape, itemsize(dtype) >= 4)
    return wide | ((n * itemsize(dtype) % 16 == 0) & (k * itemsize(dtype) % 16 == 0))


def _tiled_s(device: DeviceSpec, m: Seconds, n: Seconds, k: Seconds, batch: Seconds, dtype: str) -> Seconds:
    """The least of all kernels, in seconds of their waves."""
    one_s = device.multiprocessors / (device.peak_flops(dtype) * device.matmul_burst_fraction)  # a FLOP on one of them
    cache_bytes_per_s = device.memory_bytes_per_s * _CACHE_SPEEDUP
    m, n, k, batch = (size[None, None] for size in (m, n, k, batch))  # [tiles, pieces, products]
    tile_m, tile_n, efficiency, pieces = (_axes(values, m.ndim) for values in (*_TILE_AXES, _PIECE_AXIS))
    merging_s = np.where(pieces == 1, 0.0, _PIECES_S + 4 * (pieces + 1) * batch * m * n / cache_bytes_per_s)
    steps = _STEP * np.ceil(k / (pieces * _STEP))
    waves = np.ceil(batch * np.ceil(m / tile_m) * np.ceil(n / tile_n) * pieces / device.multiprocessors)
    step_s = 2.0 * tile_m * tile_n * one_s / efficiency
    least: Seconds = (waves * (step_s * steps + device.matmul_wave_s) + merging_s).min(axis=(0, 1))
    return least


def _axes(values: Seconds, dims: int) -> Seconds:
    """[tiles, pieces] with a dim of one for each dim of the sizes."""
    return values.reshape(*values.shape, *(1,) * (dims - 2))


def _curve_s(curve: OpCurve, flops: Seconds) -> Seconds:
    """`OpCurve.seconds` of an array: straight lines between the points, in proportion beyond the last."""
    sizes, seconds = (np.array(values) for values in zip(*curve.points, strict=True))
    return np.interp(flops, sizes, seconds) * np.maximum(flops / sizes[-1], 1.0)
