"""Matrix products by shape: published kernel times, what holds for any shape, and how fast the prices come."""

import dataclasses
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster import ClusterSpec
from autopar.cost.gemm import gemm_time_s, gemm_times_s
from autopar.curves import DeviceCurves, OpCurve

A100, H100, CPU = (ClusterSpec.preset(name).device for name in ("a100-80g", "h100-sxm", "cpu"))
DEVICES = st.sampled_from([ClusterSpec.preset(n).device for n in ("v100-32g", "a100-80g", "h100-sxm", "b200", "cpu")])
SIZES = st.integers(0, 1 << 15)

# XLA's table for sm_90: batch, m, n, k and TFLOP/s of bf16 products, one at a time. Every seventh of the 97 that
# the tiles were fitted to.
H100_BURST = [
    (1, 1024, 2048, 256, 139.5),
    (2, 2048, 256, 512, 139.2),
    (1, 2048, 2048, 2048, 632.0),
    (1, 4096, 4096, 256, 392.2),
    (4, 1024, 512, 2048, 514.2),
    (1, 512, 4096, 1024, 373.3),
    (2, 512, 1024, 2048, 349.5),
    (4, 256, 2048, 1024, 358.9),
    (4, 4096, 512, 512, 441.5),
    (4, 2048, 512, 2048, 621.4),
    (4, 4096, 4096, 4096, 793.1),
    (1, 1024, 2048, 1024, 373.3),
    (4, 4096, 1024, 4096, 777.6),
    (1, 4096, 512, 4096, 650.0),
]
# Vidur's kernel times of the layers of Llama 2 (70B, 70B in eight parts, 7B): m tokens, n, k and ms, bf16.
LLAMA_LAYERS = {
    "h100-sxm": [
        (4096, 57344, 8192, 5.669),
        (4096, 8192, 28672, 2.647),
        (4096, 10240, 8192, 0.983),
        (4096, 8192, 8192, 0.789),
        (3456, 57344, 8192, 4.602),
        (3456, 8192, 8192, 0.704),
    ],
    "a100-80g": [
        (4096, 57344, 8192, 15.94),
        (4096, 8192, 28672, 8.064),
        (4096, 10240, 8192, 2.872),
        (4096, 8192, 8192, 2.377),
        (3584, 10240, 8192, 2.679),
        (4096, 7168, 8192, 1.931),
        (4096, 8192, 3584, 1.048),
        (4096, 1280, 8192, 0.348),
        (4096, 8192, 1024, 0.296),
        (16, 14336, 8192, 0.157),
        (16, 8192, 7168, 0.0835),
        (1536, 12288, 4096, 0.756),
        (1536, 22016, 4096, 1.193),
        (1280, 4096, 11008, 0.478),
        (1280, 4096, 4096, 0.187),
        (1664, 4096, 4096, 0.248),
    ],
}


def test_one_product_at_a_time_as_published():
    """Without the sustained limit, which binds products that follow each other for the length of a step."""
    cool = dataclasses.replace(H100, matmul_efficiency_fraction=1.0)
    b, m, n, k, tflops = np.array(H100_BURST).T
    errors = np.abs(np.log(2e-12 * b * m * n * k / gemm_times_s(cool, m, n, k, b, "bfloat16") / tflops))
    assert np.median(errors) < 0.04 and errors.max() < 0.16


@pytest.mark.parametrize("preset", LLAMA_LAYERS)
def test_layers_of_a_model_as_published(preset):
    m, n, k, ms = np.array(LLAMA_LAYERS[preset]).T
    errors = np.abs(np.log(gemm_times_s(ClusterSpec.preset(preset).device, m, n, k, 1, "bfloat16") * 1e3 / ms))
    assert np.median(errors) < 0.035 and errors.max() < 0.15


@given(DEVICES, SIZES, SIZES, SIZES, st.integers(0, 64), st.sampled_from("mnkb"), st.integers(1, 1 << 15))
def test_time_never_falls_when_a_size_grows(device, m, n, k, batch, which, more):
    grown = [size + more * (name == which) for name, size in zip("mnkb", (m, n, k, batch), strict=True)]
    small, large = gemm_time_s(device, m, n, k, batch, "float32"), gemm_time_s(device, *grown, "float32")
    assert large >= small


@given(DEVICES, st.integers(1, 1 << 15), st.integers(1, 1 << 15), st.integers(1, 1 << 15))
def test_never_faster_than_sustained_rate_and_memory(device, m, n, k):
    seconds = gemm_time_s(device, m, n, k, 1, "float32")
    rate = device.peak_flops("float32") * device.matmul_efficiency_fraction
    memory = 4 * (m * k + k * n + m * n) / (device.memory_bytes_per_s * device.memory_efficiency_fraction)
    assert seconds >= max(2 * m * n * k / rate, memory)


def test_waves_are_whole():
    """12 x 11 tiles of the largest kind fill 132 multiprocessors; more need another kernel, or another wave."""
    cool = dataclasses.replace(H100, matmul_efficiency_fraction=1.0)
    nearly, full, over = (gemm_time_s(cool, 256 * 12, 128 * 11 + more, 2048, 1, "bfloat16") for more in (-64, 0, 1))
    assert nearly == full and over > 1.1 * full


def test_a_long_sum_is_cut_to_fill_the_device():
    """256 x 256 is four tiles at most 16: without pieces of k 116 of 132 multiprocessors would idle."""
    seconds = gemm_time_s(H100, 256, 256, 1 << 16, 1, "bfloat16")
    alone = 2 * 64 * 64 * 65536 * 132 / (H100.peak_flops("bfloat16") * H100.matmul_burst_fraction * 0.7)
    assert seconds < 0.4 * alone


def test_batches_of_unaligned_rows_are_slow():
    """Heads of 108 numbers in half precision are 216 bytes, not a multiple of 16; those of 112 are 224."""
    attention = (2048, 2048, 108, 64)
    seconds = gemm_time_s(A100, *attention, "float16")
    assert seconds > 5 * gemm_time_s(A100, 2048, 2048, 112, 64, "float16")
    assert seconds == pytest.approx(2 * math.prod(attention) / (0.05 * A100.peak_flops("float16")), rel=0.01)
    assert gemm_time_s(A100, 2048, 108, 2048, 64, "float16") > 5 * gemm_time_s(A100, 2048, 112, 2048, 64, "float16")
    one, aligned = (gemm_time_s(A100, 2048, 2048, k, 1, "float16") for k in (108, 112))
    assert one <= aligned
    wide, aligned = (gemm_time_s(A100, 2048, 2048, k, 64, "float32") for k in (108, 112))
    assert wide <= aligned


def test_arrays_and_numbers_agree_and_nothing_is_free():
    m, n = np.array([[128], [4096]]), np.array([0, 1, 5000])
    times = gemm_times_s(A100, m, n, 1024, 2, "float16")
    assert times.shape == (2, 3) and times.dtype == np.float64
    assert times.tolist() == [[gemm_time_s(A100, i, j, 1024, 2, "float16") for j in (0, 1, 5000)] for i in (128, 4096)]
    assert times[0, 0] == 0.0 < times[0, 1]
    assert gemm_times_s(A100, np.array([]), 1, 1, 1, "float16").shape == (0,)


def test_devices_without_known_structure_go_by_flops():
    rate = CPU.peak_flops("float32") * CPU.matmul_efficiency_fraction
    assert gemm_time_s(CPU, 512, 512, 512, 1, "float32") == pytest.approx(2 * 512**3 / rate + CPU.matmul_ramp_s)


def test_measured_products_go_first():
    curve = OpCurve("matmul", "bfloat16", ((1e6, 1e-5), (1e9, 1e-3)))
    device = dataclasses.replace(H100, measured=DeviceCurves((curve,)))
    for size in (10, 500, 4000):
        expected = curve.seconds(2.0 * size**3) - H100.launch_overhead_s
        assert gemm_time_s(device, size, size, size, 1, "bfloat16") == pytest.approx(expected)


@pytest.mark.parametrize("size", [-1, math.nan, math.inf])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="sizes of a matrix product"):
        gemm_time_s(H100, 8, size, 8, 1, "bfloat16")


def test_two_hundred_thousand_shapes_a_second():
    sizes = np.random.default_rng(0).integers(1, 20000, (3, 50_000))
    start = time.process_time()
    gemm_times_s(H100, *sizes, 1, "bfloat16")
    assert time.process_time() - start < 0.25
