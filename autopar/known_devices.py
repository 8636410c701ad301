"""The devices of the presets, figure by figure. The letters in brackets are the sources in `autopar.presets`."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.hardware import DeviceSpec

MIB = 1024**2
GIB = 1024**3


@dataclass(frozen=True)
class _Chip:
    """What devices of one chip have in common.

    matmul, burst: shares of the peak that matrix products sustain, and reach before power binds.
    attention: share that fused attention reaches forward, backward and, by the law without shapes, in both.
    """

    tflops: dict[str, float]
    multiprocessors: int
    matmul: float
    burst: float
    attention: tuple[float, float, float]


# matmul and burst: A100 and H100 fitted to [Vidur], H100's burst to [XLA]; V100 and the A100 on PCIe as the A100 with
# the second one's ratio in [MAMF]; B200, MI300X by the H100's distance (0.88) to [MAMF]; L40S as the A100.
# attention: A100 and H100 fitted to [FA2]; V100 has no such kernel in torch and goes through the memory-efficient one,
# taken at half its products' rate; B200, MI300X by the H100's ratio, L40S by the A100's, for want of a measurement.
_V100 = _Chip(
    {"float64": 7.8, "float32": 15.7, "float16": 125.0}, 80, 0.77, 0.80, (0.40, 0.40, 0.40)
)  # [V100]; no bf16
_A100_TFLOPS = {"float64": 19.5, "float32": 19.5, "tf32": 156.0, "bfloat16": 312.0, "float16": 312.0}  # [A100]
_A100 = _Chip(_A100_TFLOPS, 108, 0.77, 0.80, (0.746, 0.642, 0.66))
_A100_PCIE = _Chip(_A100_TFLOPS, 108, 0.72, 0.75, (0.70, 0.60, 0.62))
_H100 = _Chip(
    {  # [H100]
        "float64": 67.0,
        "float32": 67.0,
        "tf32": 494.7,
        "bfloat16": 989.4,
        "float16": 989.4,
        "float8_e4m3fn": 1978.9,
        "float8_e5m2": 1978.9,
    },
    132,
    0.71,
    0.855,
    (0.387, 0.3415, 0.345),
)
_B200_TFLOPS = {  # [B200]
    "float64": 37.0,
    "float32": 75.0,
    "tf32": 1125.0,
    "bfloat16": 2250.0,
    "float16": 2250.0,
    "float8_e4m3fn": 4500.0,
    "float8_e5m2": 4500.0,
}
_B200 = _Chip(_B200_TFLOPS, 148, 0.69, 0.83, (0.387, 0.3415, 0.345))
_GB200 = _Chip({name: rate * 2.5 / 2.25 for name, rate in _B200_TFLOPS.items()}, 152, 0.65, 0.78, (0.36, 0.32, 0.32))
_L40S = _Chip(
    {  # [L40S]
        "float64": 1.4,
        "float32": 91.6,
        "tf32": 183.0,
        "bfloat16": 362.0,
        "float16": 362.0,
        "float8_e4m3fn": 733.0,
        "float8_e5m2": 733.0,
    },
    142,
    0.72,
    0.75,
    (0.70, 0.60, 0.62),
)
_MI300X = _Chip(
    {  # [MI300X]
        "float64": 163.4,
        "float32": 163.4,
        "tf32": 653.7,
        "bfloat16": 1307.4,
        "float16": 1307.4,
        "float8_e4m3fn": 2614.9,
        "float8_e5m2": 2614.9,
    },
    304,
    0.53,
    0.60,
    (0.34, 0.30, 0.30),
)


def _device(
    name: str,
    chip: _Chip,
    memory_mib: int,
    memory_bytes_per_s: float,
    price: float | None,
    host: float = 1.0,
    in_steps: float = 0.85,
    *,
    link_bytes_per_s: float,
) -> DeviceSpec:
    """link_bytes_per_s: of the link to the host, one way.

    host: how many times longer its host takes than those of the H100's nodes.

    in_steps: `DeviceSpec.step_fraction`. On H100 fitted to the runs on one node in benchmarks/data/h100_sweep.json that
    no host and no network holds up (0.85), on A100 to training runs on one node in benchmarks/data/runs.json (0.95);
    V100 as the A100, later devices as the H100, for want of a measurement.
    """
    forward, backward, both = chip.attention
    return DeviceSpec(
        name=name,
        kind="cuda",
        memory_bytes=memory_mib * MIB,
        reserved_bytes=3 * GIB // 2,  # CUDA context about 0.5 GiB, NCCL buffers and cuBLAS workspaces about 1 GiB
        memory_bytes_per_s=memory_bytes_per_s,
        memory_efficiency_fraction=0.85,  # STREAM-like kernels reach 0.85 to 0.92 on all of these
        peak_flops_per_s=tuple((dtype, rate * 1e12) for dtype, rate in chip.tflops.items()),
        matmul_efficiency_fraction=chip.matmul,
        matmul_ramp_s=1e-5,  # of the law without shapes: a bf16 product of 2,048 cubed reaches 0.71 of the best on H100
        attention_efficiency_fraction=both,
        launch_overhead_s=4e-6,  # eager launches follow each other at 4 to 5 us, the device's own gap is 1 to 2 us
        multiprocessors=chip.multiprocessors,
        matmul_burst_fraction=chip.burst,
        matmul_start_s=4.6e-6,  # [XLA]; [Vidur] has 3.5 to 5.6 us left when a product with one row has read its weights
        matmul_wave_s=1.4e-6,  # [XLA]
        attention_forward_fraction=forward,
        attention_backward_fraction=backward,
        host_op_s=host * 1.2e-5,  # these: `autopar.cost.host`
        host_view_s=host * 2.5e-6,
        host_backward_op_s=host * 8.0e-6,
        host_optimizer_op_s=host * 1.2e-5,
        host_compiled_op_s=host * 4.0e-6,
        host_replay_s=1e-9,
        kernel_gap_s=1.0e-6,
        step_fraction=in_steps,
        price_per_hour_usd=price,
        host_link_bytes_per_s=0.75 * link_bytes_per_s,  # the share of the wire that copies over PCIe reach, see presets
    )


# The link to the host, one way, 16 lanes [PCIE]; GB200: half of what joins a Grace to its two devices [C2C].
_PCIE3, _PCIE4, _PCIE5, _C2C = 16e9, 32e9, 64e9, 225e9

# Prices: [PRICE]. Memory: what nvidia-smi or rocm-smi report as total.
V100_16G = _device("V100-SXM2-16GB", _V100, 16160, 900e9, 0.97, host=1.5, in_steps=0.95, link_bytes_per_s=_PCIE3)
V100_32G = _device("V100-SXM2-32GB", _V100, 32510, 900e9, 0.97, host=1.5, in_steps=0.95, link_bytes_per_s=_PCIE3)
A100_40G = _device("A100-SXM4-40GB", _A100, 40536, 1.555e12, None, host=1.5, in_steps=0.95, link_bytes_per_s=_PCIE4)
A100_80G = _device("A100-SXM4-80GB", _A100, 81920, 2.039e12, 1.30, host=1.5, in_steps=0.95, link_bytes_per_s=_PCIE4)
A100_PCIE = _device(
    "NVIDIA A100 80GB PCIe", _A100_PCIE, 81920, 1.935e12, None, host=1.5, in_steps=0.95, link_bytes_per_s=_PCIE4
)
H100_SXM = _device("NVIDIA H100 80GB HBM3", _H100, 81559, 3.35e12, 2.95, link_bytes_per_s=_PCIE5)
H200 = _device("NVIDIA H200", _H100, 143771, 4.8e12, 4.00, link_bytes_per_s=_PCIE5)
B200 = _device("B200", _B200, 183359, 7.7e12, 5.25, link_bytes_per_s=_PCIE5)
GB200 = _device("GB200", _GB200, 189471, 8.0e12, None, link_bytes_per_s=_C2C)
L40S = _device("NVIDIA L40S", _L40S, 46068, 864e9, None, link_bytes_per_s=_PCIE4)
MI300X = _device("AMD Instinct MI300X", _MI300X, 196592, 5.3e12, None, link_bytes_per_s=_PCIE5)

X86_CORE = DeviceSpec(  # all figures [CPU]
    name="x86 core",
    kind="cpu",
    memory_bytes=4 * GIB,  # a choice, not a measurement: planning takes no notice of the host
    reserved_bytes=GIB // 2,  # Python, torch and gloo before the first tensor
    memory_bytes_per_s=45e9,  # copy_ of 64 MiB, read + written
    memory_efficiency_fraction=0.7,  # exp 13, softmax 18, silu, gelu, rsqrt 35, mul 65 to 100 GB/s: about 31
    # matmul of 1024 cubed gave 59, 112, 496 GFLOP/s; float16 has no fast kernel (512 cubed: 2.7)
    peak_flops_per_s=(("float64", 59e9), ("float32", 112e9), ("bfloat16", 496e9), ("float16", 2.7e9)),
    matmul_efficiency_fraction=0.95,  # the peaks are the best measured rates; 256 cubed and above are within 10 %
    matmul_ramp_s=2e-6,  # 64 cubed: float32 6.3 us of which 4.7 at full rate, float64 12.7 of which 8.9
    attention_efficiency_fraction=0.8,  # 512 x 64, float32: 90 of 112 GFLOP/s
    launch_overhead_s=3e-6,  # an op of an fx program costs 2.1 us, more with several arguments
)
