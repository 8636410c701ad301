"""Known clusters, with the source of each figure.

Rates are the makers' dense peaks (without structured sparsity), memory is what
`nvidia-smi` reports as total. Each preset stands for the maker's 8-GPU node (DGX, HGX).

Sources
    [V100]  NVIDIA V100 datasheet (2020): SXM2 7.8 / 15.7 / 125 TFLOP/s, 900 GB/s, NVLink 300 GB/s both directions
    [A100]  NVIDIA A100 datasheet (2021): 312 TFLOP/s bf16, 156 TF32, 19.5 fp32 and fp64 tensor core; 1,555 and
            2,039 GB/s; NVLink 600 GB/s both directions
    [H100]  NVIDIA H100 datasheet (2023), SXM: 989 TFLOP/s bf16, 494 TF32, 1,979 fp8, 67 fp32 and fp64 tensor core;
            3.35 TB/s; NVLink 900 GB/s both directions
    [H200]  NVIDIA H200 datasheet (2024), SXM: rates of the H100, 4.8 TB/s
    [B200]  NVIDIA HGX B200 datasheet (2025), an eighth of the board: 4.5 PFLOP/s bf16 with sparsity = 2.25 dense,
            1.1 TF32, 4.5 fp8, 75 fp32, 37 fp64; 7.7 TB/s; NVLink 1.8 TB/s both directions
    [DGX]   DGX-1V: 4 x 100 Gbit/s for 8 GPUs; DGX A100: 8 x 200; DGX H100, H200, B200: 8 x 400 (user guides)
    [NCCL]  NCCL src/graph/tuning.cc, LL128 ring: 1.9 us a hop over NVLink, 4.0 over the network, 10 us base;
            the same file caps the bus bandwidth of NVLink 3 at 235 of 300 GB/s, which is 0.78
    [MAMF]  Bekman, Machine Learning Engineering, "maximum achievable matmul FLOPS" (2025): 0.87 of peak on A100,
            0.80 on H100, 0.78 on B200: the best of many shapes, for milliseconds
    [XLA]   OpenXLA, xla/service/gpu/model/matmul_interpolator_data.h (2025): bf16 products on H100 by shape, one at a
            time; the largest reach 0.82 of peak
    [Vidur] Agrawal et al., Vidur (2024), data/profiling/compute: kernel times of the layers of Llama 2 7B and 70B
            by tokens: on A100 205 to 249 TFLOP/s, on H100 677 to 739 (4,096 tokens: 240 and 679 to 727)
    [FA2]   Dao, FlashAttention-2 (2023), forward + backward, head dim 128, fitted with `autopar.cost.compute`'s
            law for attention: 205 of 312 TFLOP/s on A100, 341 of 989 on H100
    [CPU]   measured on 2-core x86 (one core a process), torch 2.13, gloo, date 2026-11-24
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from autopar.cluster import ClusterSpec, DeviceSpec, LinkSpec
from autopar.cost.checks import checked_value
from autopar.errors import ClusterSpecError

MIB = 1024**2
GIB = 1024**3


@dataclass(frozen=True)
class Preset:
    """A device with the node and the network it usually comes in.

    cuda_name: what torch.cuda.get_device_name says; "" for a CPU.
    """

    name: str
    cuda_name: str
    device: DeviceSpec
    intra: LinkSpec
    inter: LinkSpec
    host_memory_bytes_per_device: int
    collective_launch_s: float
    devices_per_node: int = 8

    def cluster(self, nodes: int, devices_per_node: int, inter_node_gbit_per_s: float | None = None) -> ClusterSpec:
        """A cluster of this many nodes, with another network (Gbit/s per device, one direction) if given."""
        inter = self.inter
        if inter_node_gbit_per_s is not None:
            gbit_per_s = checked_value(inter_node_gbit_per_s, "positive", "inter_node_gbit_per_s")
            inter = replace(inter, bytes_per_s=gbit_per_s * 1e9 / 8)
        return ClusterSpec(
            name=self.name,
            nodes=nodes,
            devices_per_node=devices_per_node,
            host_memory_bytes=self.host_memory_bytes_per_device * devices_per_node,
            collective_launch_s=self.collective_launch_s,
            device=self.device,
            links=(self.intra, inter),
        )


def find_preset(name: str) -> Preset:
    """The preset of this name; ClusterSpecError listing all of them if there is none."""
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    text = str(name).lower()
    # "h100" means h100-sxm, though h200 has fewer letters to change.
    near = [p for p in PRESETS if text and p.startswith(text)] or difflib.get_close_matches(text, PRESETS, n=1)
    hint = f", did you mean {near[-1]!r}?" if near else ";"
    raise ClusterSpecError(f"unknown cluster preset {name!r}{hint} presets: {', '.join(PRESETS)}")


def preset_of_device(cuda_name: str) -> Preset:
    """The preset whose GPU calls itself `cuda_name`; ClusterSpecError if there is none."""
    for preset in PRESETS.values():
        if preset.cuda_name and preset.cuda_name in cuda_name:
            return preset
    raise ClusterSpecError(
        f"no preset describes the GPU {cuda_name!r}; measure it with `autopar profile -o cluster.json` and pass "
        f"ClusterSpec.load('cluster.json'), or name a preset: {', '.join(PRESETS)}"
    )


def _gpu(
    name: str,
    *,
    memory_mib: int,
    memory_bytes_per_s: float,
    tflops: dict[str, float],
    matmul: float,
    attention: float,
    multiprocessors: int,
    burst: float,
) -> DeviceSpec:
    return DeviceSpec(
        name=name,
        kind="cuda",
        memory_bytes=memory_mib * MIB,
        reserved_bytes=3 * GIB // 2,  # CUDA context about 0.5 GiB, NCCL buffers and cuBLAS workspaces about 1 GiB
        memory_bytes_per_s=memory_bytes_per_s,
        memory_efficiency_fraction=0.85,  # STREAM-like kernels reach 0.85 to 0.92 on all of these
        peak_flops_per_s=tuple((dtype, rate * 1e12) for dtype, rate in tflops.items()),
        matmul_efficiency_fraction=matmul,
        matmul_ramp_s=1e-5,  # so that a bf16 matmul of 2048 cubed reaches 0.86 (A100), 0.70 (H100) of the best rate
        attention_efficiency_fraction=attention,
        multiprocessors=multiprocessors,
        matmul_burst_fraction=burst,
        matmul_start_s=4.6e-6,  # [XLA]; [Vidur] has 3.5 to 5.6 us left when a product with one row has read its weights
        matmul_wave_s=1.4e-6,  # [XLA]
        launch_overhead_s=4e-6,  # eager launches follow each other at 4 to 5 us, the device's own gap is 1 to 2 us
    )


def _nvlink(generation: int, bytes_per_s: float) -> LinkSpec:
    # [NCCL] 1.9 us a hop; 0.78 of the wire is the cap NCCL itself assumes for NVLink 3
    return LinkSpec(f"NVLink {generation}", bytes_per_s, 0.78, 1.9e-6)


def _network(gbit_per_s: float) -> LinkSpec:
    # [NCCL] 4.0 us a hop; 0.85 of the wire: headers, and rails that are never evenly full
    return LinkSpec("InfiniBand", gbit_per_s * 1e9 / 8, 0.85, 4e-6)


_V100_TFLOPS = {"float64": 7.8, "float32": 15.7, "float16": 125.0}  # [V100]; it has no bfloat16 units
_A100_TFLOPS = {"float64": 19.5, "float32": 19.5, "tf32": 156.0, "bfloat16": 312.0, "float16": 312.0}  # [A100]
_H100_TFLOPS = {  # [H100]
    "float64": 67.0,
    "float32": 67.0,
    "tf32": 494.7,
    "bfloat16": 989.4,
    "float16": 989.4,
    "float8_e4m3fn": 1978.9,
    "float8_e5m2": 1978.9,
}
_B200_TFLOPS = {  # [B200]
    "float64": 37.0,
    "float32": 75.0,
    "tf32": 1125.0,
    "bfloat16": 2250.0,
    "float16": 2250.0,
    "float8_e4m3fn": 4500.0,
    "float8_e5m2": 4500.0,
}

# matmul: sustained. A100 and H100 from [Vidur]; V100 as the A100; B200 by the H100's ratio to [MAMF].
# burst: H100 from [XLA]; A100 from [Vidur], where it is hardly above the sustained rate; V100 and B200 as above.
# attention: [FA2]; V100 has no FlashAttention-2 kernel in torch and goes through the memory-efficient one, taken
# at half its matmul rate; H200 as H100; B200 by the H100's ratio, for want of a measurement.
_V100_MATMUL, _V100_BURST, _V100_ATTENTION = 0.77, 0.80, 0.40
_A100_MATMUL, _A100_BURST, _A100_ATTENTION = 0.77, 0.80, 0.66
_H100_MATMUL, _H100_BURST, _H100_ATTENTION = 0.71, 0.855, 0.345
_B200_MATMUL, _B200_BURST, _B200_ATTENTION = 0.69, 0.83, 0.345


def _v100(memory_gb: int, memory_mib: int) -> Preset:
    device = _gpu(
        f"V100-SXM2-{memory_gb}GB",
        memory_mib=memory_mib,
        memory_bytes_per_s=900e9,
        tflops=_V100_TFLOPS,
        matmul=_V100_MATMUL,
        multiprocessors=80,
        burst=_V100_BURST,
        attention=_V100_ATTENTION,
    )
    cuda_name = f"V100-SXM2-{memory_gb}GB"
    return Preset(f"v100-{memory_gb}g", cuda_name, device, _nvlink(2, 150e9), _network(50), 64 * GIB, 1e-5)


def _a100(memory_gb: int, memory_mib: int, memory_bytes_per_s: float) -> Preset:
    device = _gpu(
        f"A100-SXM4-{memory_gb}GB",
        memory_mib=memory_mib,
        memory_bytes_per_s=memory_bytes_per_s,
        tflops=_A100_TFLOPS,
        matmul=_A100_MATMUL,
        multiprocessors=108,
        burst=_A100_BURST,
        attention=_A100_ATTENTION,
    )
    cuda_name = f"A100-SXM4-{memory_gb}GB"
    return Preset(f"a100-{memory_gb}g", cuda_name, device, _nvlink(3, 300e9), _network(200), 128 * GIB, 1e-5)


def _hopper(name: str, cuda_name: str, memory_mib: int, memory_bytes_per_s: float) -> Preset:
    device = _gpu(
        cuda_name,
        memory_mib=memory_mib,
        memory_bytes_per_s=memory_bytes_per_s,
        tflops=_H100_TFLOPS,
        matmul=_H100_MATMUL,
        multiprocessors=132,
        burst=_H100_BURST,
        attention=_H100_ATTENTION,
    )
    return Preset(name, cuda_name, device, _nvlink(4, 450e9), _network(400), 256 * GIB, 1e-5)


def _b200() -> Preset:
    device = _gpu(
        "B200",
        memory_mib=183359,
        memory_bytes_per_s=7.7e12,
        tflops=_B200_TFLOPS,
        matmul=_B200_MATMUL,
        multiprocessors=148,
        burst=_B200_BURST,
        attention=_B200_ATTENTION,
    )
    return Preset("b200", "NVIDIA B200", device, _nvlink(5, 900e9), _network(400), 256 * GIB, 1e-5)


def _cpu() -> Preset:
    """One core a rank, gloo over loopback. All figures [CPU]."""
    device = DeviceSpec(
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
    # Between 2 processes: all-reduce of 64 B 330 to 400 us, all-gather and permute 140 to 350; of 16 MiB: all-gather
    # 1.25, reduce-scatter 0.76, all-reduce 0.88, permute 2.1 GB/s each way.
    loopback = LinkSpec("gloo over loopback", 1e9, 1.0, 1e-4)
    ethernet = LinkSpec("gloo over 10 Gbit/s Ethernet", 1.25e9, 0.7, 1.5e-4)  # not measured
    return Preset("cpu", "", device, loopback, ethernet, 4 * GIB, 1e-4)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _v100(16, 16160),
        _v100(32, 32510),
        _a100(40, 40536, 1.555e12),
        _a100(80, 81920, 2.039e12),
        _hopper("h100-sxm", "NVIDIA H100 80GB HBM3", 81559, 3.35e12),
        _hopper("h200", "NVIDIA H200", 143771, 4.8e12),
        _b200(),
        _cpu(),
    )
}
