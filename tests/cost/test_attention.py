"""Fused attention by shape: the published benchmarks, and what holds for any shape."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster import ClusterSpec
from autopar.cost.attention import attention_time_s, attention_times_s
from autopar.curves import AttentionRate, DeviceCurves

DEVICES = {name: ClusterSpec.preset(name).device for name in ("a100-80g", "h100-sxm", "b200", "cpu")}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

# FlashAttention-2 (Dao 2023), flash2_{a100,h100}_fwd_bwd_benchmark.png: TFLOP/s of forward + backward by tokens a
# sequence; 16 K tokens in all, 2,048 wide, bf16, causal attention counted half. Width of a head, causal.
BOTH_TFLOPS = {
    ("a100-80g", 64, False): (132, 153, 162, 171, 175, 176),
    ("a100-80g", 128, False): (None, 173, 187, 196, 201, 203),
    ("a100-80g", 64, True): (88, 119, 140, 156, 165, 171),
    ("a100-80g", 128, True): (99, 133, 155, 173, 182, 189),
    ("h100-sxm", 64, False): (215, 254, 274, 288, 294, 296),
    ("h100-sxm", 128, False): (248, 294, 320, 326, 335, 338),
    ("h100-sxm", 64, True): (141, 192, 232, 257, 273, 284),
    ("h100-sxm", 128, True): (163, 221, 265, 294, 308, 328),
}
# FlashAttention-2's forward pass in the benchmark of FlashAttention-3 (Shah et al. 2024), width 128.
FORWARD_TFLOPS = {False: (309, 350, 362, 368, 370, 370), True: (191, 260, 298, 319, 333, 335)}


def seconds(device, length, width, causal, backward):
    return attention_time_s(
        DEVICES[device],
        16384 // length,
        2048 // width,
        length,
        length,
        width,
        "bfloat16",
        causal=causal,
        backward=backward,
    )


@pytest.mark.parametrize(("device", "width", "causal"), BOTH_TFLOPS)
def test_forward_and_backward_as_published(device, width, causal):
    for length, tflops in zip(LENGTHS, BOTH_TFLOPS[device, width, causal], strict=True):
        both = sum(seconds(device, length, width, causal, backward) for backward in (False, True))
        flops = 3.5 * 4 * 16384 * length * 2048 / (2 if causal else 1)
        if tflops is not None:
            assert flops / both / 1e12 == pytest.approx(tflops, rel=0.05)


@pytest.mark.parametrize("causal", FORWARD_TFLOPS)
def test_forward_as_published(causal):
    for length, tflops in zip(LENGTHS, FORWARD_TFLOPS[causal], strict=True):
        flops = 4 * 16384 * length * 2048 / (2 if causal else 1)
        assert flops / seconds("h100-sxm", length, 128, causal, False) / 1e12 == pytest.approx(tflops, rel=0.05)


SIZES = st.tuples(*(st.integers(1, limit) for limit in (64, 128, 1 << 15, 1 << 15, 300)))


@given(
    st.sampled_from(list(DEVICES.values())),
    SIZES,
    st.integers(0, 4),
    st.integers(1, 1 << 12),
    st.booleans(),
    st.booleans(),
)
def test_time_never_falls_when_a_size_grows(device, sizes, which, more, causal, backward):
    grown = [size + more * (i == which) for i, size in enumerate(sizes)]
    small, large = (
        attention_time_s(device, *s, "float32", causal=causal, backward=backward) for s in (tuple(sizes), tuple(grown))
    )
    assert large >= small * (1 - 1e-12)


def test_fewer_keys_and_values_move_fewer_bytes():
    args = (DEVICES["a100-80g"], 8, 32, 512, 512, 128, "bfloat16")
    shared = attention_time_s(*args, causal=True, backward=False, kv_heads=8)
    assert shared < attention_time_s(*args, causal=True, backward=False)


def test_arrays_broadcast():
    lengths = np.array([1024, 2048])
    times = attention_times_s(
        DEVICES["h100-sxm"], 1, [[8], [16]], lengths, lengths, 64, "bfloat16", causal=True, backward=True
    )
    assert times.shape == (2, 2) and (np.diff(times) > 0).all() and (np.diff(times, axis=0) > 0).all()


def test_unknown_rates_by_direction_fall_back_to_the_common_one():
    device = dataclasses.replace(DEVICES["h100-sxm"], attention_forward_fraction=0.0)
    ratio = device.attention_efficiency_fraction / DEVICES["h100-sxm"].attention_forward_fraction
    args = (1, 16, 1 << 15, 1 << 15, 128, "bfloat16")
    common, known = (attention_time_s(d, *args, causal=False, backward=False) for d in (device, DEVICES["h100-sxm"]))
    assert common * ratio == pytest.approx(known, rel=1e-2)


def test_measured_rates_go_first():
    rate = AttentionRate("forward", "bfloat16", 1e-5, 1e14, 1e12)
    device = dataclasses.replace(DEVICES["h100-sxm"], measured=DeviceCurves((), (rate,)))
    flops, moved = 4 * 2 * 8 * 1024**2 * 64, 2 * 4 * 2 * 8 * 1024 * 64
    expected = 1e-5 - device.launch_overhead_s + flops / 1e14 + moved / 1e12
    found = attention_time_s(device, 2, 8, 1024, 1024, 64, "bfloat16", causal=False, backward=False)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("size", [-1, math.nan, math.inf])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match="sizes of an attention"):
        attention_time_s(DEVICES["h100-sxm"], 1, 1, size, 1, 64, "bfloat16", causal=False, backward=False)
