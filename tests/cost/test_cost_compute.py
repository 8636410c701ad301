"""Classes, FLOPs and times of ops."""

import math
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from autopar.cluster import ClusterSpec
from autopar.cost.compute import OpClass, op_class, op_flops, op_time_s
from autopar.errors import ClusterSpecError

aten = torch.ops.aten
A100 = ClusterSpec.preset("a100-80g").device
H100 = ClusterSpec.preset("h100-sxm").device
CPU = ClusterSpec.preset("cpu").device


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (aten.mm.default, OpClass.MATMUL),
        (aten.addmm.default, OpClass.MATMUL),
        (aten._grouped_mm.default, OpClass.MATMUL),
        (aten.convolution_backward.default, OpClass.CONVOLUTION),
        (aten._scaled_dot_product_flash_attention_for_cpu.default, OpClass.ATTENTION),
        (aten._scaled_dot_product_flash_attention_for_cpu_backward.default, OpClass.ATTENTION),
        (aten._scaled_dot_product_efficient_attention.default, OpClass.ATTENTION),
        (aten.mul.Tensor, OpClass.ELEMENTWISE),
        (aten.gelu_backward.default, OpClass.ELEMENTWISE),
        (aten._to_copy.default, OpClass.ELEMENTWISE),
        (aten.clone.default, OpClass.ELEMENTWISE),
        (aten.contiguous.default, OpClass.ELEMENTWISE),
        (aten.to.dtype, OpClass.ELEMENTWISE),
        (aten.sum.dim_IntList, OpClass.REDUCTION),
        (aten._softmax.default, OpClass.REDUCTION),
        (aten.native_layer_norm_backward.default, OpClass.REDUCTION),
        (aten.native_dropout.default, OpClass.RANDOM),
        (aten.view.default, OpClass.VIEW),
        (aten._unsafe_view.default, OpClass.VIEW),
        (aten.detach.default, OpClass.VIEW),
        (operator.getitem, OpClass.VIEW),
        (aten.embedding.default, OpClass.OTHER),
        (aten.index.Tensor, OpClass.OTHER),
        (math.sqrt, OpClass.OTHER),
    ],
)
def test_classes(target, kind):
    assert op_class(target) is kind


# -- FLOPs ------------------------------------------------------------------------


def flops_of(target, *args, **kwargs):
    """op_flops on fake tensors of the shapes given as tuples."""
    with FakeTensorMode():
        args = [torch.empty(a) if isinstance(a, tuple) else a for a in args]
        return op_flops(target, args, kwargs, target(*args, **kwargs))


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (aten.mm.default, ((3, 5), (5, 7)), 2 * 3 * 5 * 7),
        (aten.addmm.default, ((7,), (3, 5), (5, 7)), 2 * 3 * 5 * 7),
        (aten.bmm.default, ((2, 3, 5), (2, 5, 7)), 2 * 2 * 3 * 5 * 7),
        (aten.mv.default, ((3, 5), (5,)), 2 * 3 * 5),
        (aten.addmv.default, ((3,), (3, 5), (5,)), 2 * 3 * 5),
        (aten.dot.default, ((5,), (5,)), 2 * 5),
        (aten.addbmm.default, ((3, 7), (2, 3, 5), (2, 5, 7)), 2 * 2 * 3 * 5 * 7),
        (aten.matmul.default, ((4, 2, 3, 5), (2, 5, 7)), 2 * 4 * 2 * 3 * 5 * 7),
        (aten.matmul.default, ((3, 5), (2, 5, 7)), 2 * 2 * 3 * 5 * 7),
        (aten.matmul.default, ((5,), (2, 5, 7)), 2 * 2 * 5 * 7),
        (aten.matmul.default, ((2, 3, 5), (5,)), 2 * 2 * 3 * 5),
        (aten.linear.default, ((2, 3, 5), (7, 5)), 2 * 2 * 3 * 5 * 7),
        (aten.add.Tensor, ((3, 5), (3, 5)), 0),
        (aten.view.default, ((3, 5), [15]), 0),
    ],
)
def test_flops(target, args, expected):
    assert flops_of(target, *args) == expected


def test_convolution_as_torch_counts_it():
    image, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv2d(image, weight)
    args = ((2, 3, 8, 8), (4, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    assert flops_of(aten.convolution.default, *args) == counter.get_total_flops() > 0


QKV = ((2, 4, 16, 8), (2, 4, 32, 8), (2, 4, 32, 8))


def test_attention_agrees_with_torchs_counter_where_it_has_one():
    flash = aten._scaled_dot_product_flash_attention
    with FakeTensorMode():
        q, k, v = (torch.empty(shape) for shape in QKV)
        ours = op_flops(flash.default, (q, k, v), {}, None)
        assert ours == flop_registry[flash](q, k, v, out_val=(q,))
        assert ours == op_flops(aten._scaled_dot_product_flash_attention_for_cpu.default, (q, k, v), {}, None)
        backward = aten._scaled_dot_product_flash_attention_backward
        args = (q, q, k, v, q, None, None, None, 16, 32, 0.0, False, None, None)
        ours = op_flops(backward.default, args, {}, None)
        assert ours == flop_registry[backward](*args, out_val=(q, k, v))
        cpu = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        assert ours == op_flops(cpu, (q, q, k, v, q, None, 0.0, False), {}, None)


def test_causal_attention_counts_what_is_computed():
    shape = (2, 4, 16, 8)
    target = aten._scaled_dot_product_flash_attention_for_cpu.default
    full, causal = (flops_of(target, shape, shape, shape, 0.0, c) for c in (False, True))
    assert causal / full == pytest.approx((16 + 1) / (2 * 16))
    assert flops_of(target, shape, shape, shape, is_causal=True) == causal
    assert full == 2 * 2 * (2 * 4) * 16 * 16 * 8


def test_grouped_queries_count_by_the_query_heads():
    with FakeTensorMode():
        q, kv = torch.empty(1, 8, 16, 4), torch.empty(1, 2, 16, 4)
        for target in (
            aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_fused_attention_overrideable.default,
        ):
            assert op_flops(target, (q, kv, kv), {}, None) == 4 * 8 * 16 * 16 * 4


def test_grouped_matmul():
    target = aten._grouped_mm.default
    tokens, experts, weights = torch.empty(10, 5), torch.empty(3, 4, 5), torch.empty(3, 5, 7)
    assert op_flops(target, (tokens, weights), {}, None) == 2 * 10 * 5 * 7
    assert op_flops(target, (experts, weights), {}, None) == 2 * 3 * 4 * 5 * 7
    assert op_flops(target, (torch.empty(5, 10), torch.empty(10, 7)), {}, None) == 2 * 5 * 10 * 7


def test_a_targetless_call_has_no_flops():
    assert op_flops(operator.getitem, ((1,), 0), {}, None) == 0


# -- time -------------------------------------------------------------------------

KINDS = st.sampled_from([k for k in OpClass if k is not OpClass.VIEW])
DEVICES = st.sampled_from([ClusterSpec.preset(n).device for n in ("v100-16g", "a100-40g", "h100-sxm", "b200", "cpu")])
WORK = st.floats(0, 1e18)


@given(DEVICES, KINDS, WORK, WORK, WORK, WORK)
def test_time_never_falls_when_work_grows(device, kind, flops, nbytes, more_flops, more_bytes):
    base = op_time_s(device, kind, flops, nbytes, "float32")
    assert base >= device.launch_overhead_s
    assert op_time_s(device, kind, flops + more_flops, nbytes, "float32") >= base
    assert op_time_s(device, kind, flops, nbytes + more_bytes, "float32") >= base


@given(DEVICES, KINDS, WORK, WORK)
def test_time_is_continuous(device, kind, flops, nbytes):
    base = op_time_s(device, kind, flops, nbytes, "float32")
    near = op_time_s(device, kind, flops * (1 + 1e-9) + 1e-3, nbytes * (1 + 1e-9) + 1e-3, "float32")
    assert near == pytest.approx(base, rel=1e-8, abs=1e-9)


@given(DEVICES, WORK, WORK)
def test_views_are_free(device, flops, nbytes):
    assert op_time_s(device, OpClass.VIEW, flops, nbytes, "float32") == 0.0


@given(DEVICES, st.floats(1, 1e18))
def test_matmul_efficiency_rises_and_stays_below_its_limit(device, flops):
    rate = flops / op_time_s(device, OpClass.MATMUL, flops, 0.0, "float32")
    rate_of_double = 2 * flops / op_time_s(device, OpClass.MATMUL, 2 * flops, 0.0, "float32")
    limit = device.peak_flops("float32") * device.matmul_efficiency_fraction
    assert rate <= rate_of_double <= limit * (1 + 1e-9)


def test_matmul_efficiency_is_half_its_limit_at_the_ramp():
    limit = H100.peak_flops("bfloat16") * H100.matmul_efficiency_fraction
    half = limit * H100.matmul_ramp_s
    kernel_s = op_time_s(H100, OpClass.MATMUL, half, 0.0, "bfloat16") - H100.launch_overhead_s
    assert half / kernel_s == pytest.approx(limit / 2)


def test_what_binds():
    streaming = H100.memory_bytes_per_s * H100.memory_efficiency_fraction
    assert op_time_s(H100, OpClass.ELEMENTWISE, 0.0, streaming, "float32") == pytest.approx(1.0, rel=1e-4)
    tall = op_time_s(H100, OpClass.MATMUL, 1.0, streaming, "bfloat16")
    assert tall == pytest.approx(1.0, rel=1e-4)
    square = op_time_s(H100, OpClass.MATMUL, 1e15, 1.0, "bfloat16")
    assert square == pytest.approx(1e15 / (989.4e12 * H100.matmul_efficiency_fraction), rel=1e-3)


def test_a_rate_that_the_device_lacks_is_an_error_only_where_it_is_needed():
    v100 = ClusterSpec.preset("v100-32g").device
    with pytest.raises(ClusterSpecError, match="no rate for bfloat16"):
        op_time_s(v100, OpClass.MATMUL, 1e9, 1e6, "bfloat16")
    assert op_time_s(v100, OpClass.ELEMENTWISE, 0.0, 1e6, "bfloat16") > 0


@pytest.mark.parametrize(("flops", "nbytes"), [(-1.0, 0.0), (0.0, -1.0), (math.nan, 0.0), (0.0, math.inf)])
def test_impossible_work_is_refused(flops, nbytes):
    with pytest.raises(ValueError, match="give finite numbers"):
        op_time_s(H100, OpClass.MATMUL, flops, nbytes, "float32")


# FlashAttention-2's benchmark figures (Dao 2023; flash2_{a100,h100}_fwd_bwd_benchmark.png in its repository):
# TFLOP/s of forward + backward, head dim 128, 16 K tokens of width 2,048, not causal, by sequence length.
FLASH_TFLOPS = {
    "a100-80g": {1024: 173, 2048: 187, 4096: 196, 8192: 201, 16384: 203},
    "h100-sxm": {512: 248, 1024: 294, 2048: 320, 4096: 326, 8192: 335, 16384: 338},
}


@pytest.mark.parametrize("preset", FLASH_TFLOPS)
def test_attention_by_length_as_published(preset):
    device = ClusterSpec.preset(preset).device
    tensor_bytes = 16384 * 2048 * 2
    for seq, tflops in FLASH_TFLOPS[preset].items():
        forward = 4.0 * 16384 * seq * 2048
        seconds = op_time_s(device, OpClass.ATTENTION, forward, 4 * tensor_bytes, "bfloat16")
        seconds += op_time_s(device, OpClass.ATTENTION, 2.5 * forward, 8 * tensor_bytes, "bfloat16")
        assert 3.5 * forward / seconds / 1e12 == pytest.approx(tflops, rel=0.05)


@pytest.mark.parametrize(("device", "tflops"), [(A100, 267.9), (H100, 792.1)])
def test_large_matmuls_stay_just_below_the_best_measured(device, tflops):
    """Best bf16 matmuls found by Bekman's MAMF finder (Machine Learning Engineering, 2024)."""
    flops = 2.0 * 8192**3
    reached = flops / op_time_s(device, OpClass.MATMUL, flops, 3 * 2.0 * 8192**2, "bfloat16") / 1e12
    assert 0.85 * tflops < reached < tflops
