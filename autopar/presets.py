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
    [L40S]  NVIDIA L40S datasheet (2023): 362 TFLOP/s bf16, 183 TF32, 733 fp8, 91.6 fp32; 864 GB/s; PCIe 4 x16
    [MI300X] AMD Instinct MI300X datasheet (2023): 1,307 TFLOP/s bf16, 2,615 fp8, 163.4 fp32; 5.3 TB/s; 304 compute
            units; Infinity Fabric 7 x 128 GB/s both directions to the 7 others
    [GB200] NVIDIA GB200 NVL72 datasheet (2025), a 72nd of the rack: 2.5 PFLOP/s bf16 dense, 8 TB/s; NVLink
            1.8 TB/s both directions among all 72
    [DGX]   DGX-1V: 4 x 100 Gbit/s for 8 GPUs; DGX A100: 8 x 200; DGX H100, H200, B200, GB200 NVL72: 400 a GPU (user
            guides). Nodes with PCIe alone have what is usual: one 200 Gbit/s adapter for 8 A100, two for 8 L40S
    [PCIE]  PCI Express, 16 lanes, one way: 16 GB/s in generation 3 (V100), 32 in 4 (A100, L40S), 64 in 5 (H100, H200,
            B200, MI300X)
    [C2C]   NVIDIA GB200 datasheet (2025): NVLink-C2C, 900 GB/s both directions between a Grace and its two B200
    [NCCL]  NCCL src/graph/tuning.cc, LL128 ring: 1.9 us a hop over NVLink, 4.0 over the network, 10 us base;
            the same file caps the bus bandwidth of NVLink 3 at 235 of 300 GB/s, which is 0.78
    [MAMF]  Bekman, Machine Learning Engineering, "maximum achievable matmul FLOPS" (2025): 0.87 of peak on A100,
            0.80 on H100, 0.78 on B200: the best of many shapes, for milliseconds
    [XLA]   OpenXLA, xla/service/gpu/model/matmul_interpolator_data.h (2025): bf16 products on H100 by shape, one at a
            time; the largest reach 0.82 of peak
    [Vidur] Agrawal et al., Vidur (2024), data/profiling/compute: kernel times of the layers of Llama 2 7B and 70B
            by tokens: on A100 205 to 249 TFLOP/s, on H100 677 to 739 (4,096 tokens: 240 and 679 to 727)
    [FA2]   Dao, FlashAttention-2 (2023), and its forward pass in Shah et al., FlashAttention-3 (2024), fitted with
            `autopar.cost.attention`; by `autopar.cost.compute`'s law, which knows no shapes, 205 of 312 TFLOP/s on
            A100, 341 of 989 on H100
    [GPTFAST] PyTorch blog, "Accelerating Generative AI with PyTorch II: GPT, Fast" (2023), see `autopar.cost.host`
    [GRAPHS] Gray, "Getting Started with CUDA Graphs", NVIDIA developer blog (2019): kernels of 2.9 us follow each other
            after 3.8 us from a stream, 3.4 us from a graph; "Constant Time Launch for Straight-Line CUDA Graphs"
            (2024): a replay costs the host 2.5 us and about 1 ns a kernel
    [PRICE] USD per device-hour on demand, node and network included, to be replaced by one's own contract. H100 2.95:
            median of 37 providers, V100 0.97: median of its generation (aimultiple.com/gpu-index, 20 May 2026); A100
            1.30, H200 4.00: middle of the specialised clouds' range (mercatus-ai.com/blog/cloud-gpu-pricing, May 2026);
            B200 5.25: middle of the specialised clouds' range (lyceum.technology, 11 March 2026). Others: none found
    [CPU]   measured on 2-core x86 (one core a process), torch 2.13, gloo, date 2026-11-24
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from autopar import known_devices as known
from autopar.cluster import ClusterSpec, DeviceSpec, LinkSpec
from autopar.cost.checks import checked_value
from autopar.errors import ClusterSpecError

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


def _nvlink(generation: int, bytes_per_s: float, *, reduces: bool = False) -> LinkSpec:
    # [NCCL] 1.9 us a hop; 0.78 of the wire is the cap NCCL itself assumes for NVLink 3
    return LinkSpec(f"NVLink {generation}", bytes_per_s, 0.78, 1.9e-6, reduces=reduces)


def _pcie(generation: int, bytes_per_s: float) -> LinkSpec:
    # [NCCL] 2.5 us a hop; copies between devices reach about 0.75 of the wire
    return LinkSpec(f"PCIe {generation}", bytes_per_s, 0.75, 2.5e-6)


def _network(gbit_per_s: float, rails: int | None = None) -> LinkSpec:
    # [NCCL] 4.0 us a hop; 0.85 of the wire: headers, and rails that are never evenly full
    return LinkSpec("InfiniBand", gbit_per_s * 1e9 / 8, 0.85, 4e-6, rails=rails)


def _gpu(name: str, device: DeviceSpec, intra: LinkSpec, inter: LinkSpec, host_gib: int, per_node: int = 8) -> Preset:
    """host_gib: memory of the host, per device."""
    cuda_name = {"B200": "NVIDIA B200", "GB200": "NVIDIA GB200"}.get(device.name, device.name)
    return Preset(name, cuda_name, device, intra, inter, host_gib * GIB, 1e-5, per_node)  # [NCCL] 10 us base


_GPUS = (
    _gpu("v100-16g", known.V100_16G, _nvlink(2, 150e9), _network(50, rails=4), 64),
    _gpu("v100-32g", known.V100_32G, _nvlink(2, 150e9), _network(50, rails=4), 64),
    _gpu("a100-pcie", known.A100_PCIE, _pcie(4, 32e9), _network(25, rails=1), 64),
    _gpu("a100-40g", known.A100_40G, _nvlink(3, 300e9), _network(200), 128),
    _gpu("a100-80g", known.A100_80G, _nvlink(3, 300e9), _network(200), 128),
    _gpu("h100-sxm", known.H100_SXM, _nvlink(4, 450e9, reduces=True), _network(400), 256),
    _gpu("h200", known.H200, _nvlink(4, 450e9, reduces=True), _network(400), 256),
    _gpu("b200", known.B200, _nvlink(5, 900e9, reduces=True), _network(400), 256),
    _gpu("gb200-nvl72", known.GB200, _nvlink(5, 900e9, reduces=True), _network(400), 240, per_node=72),
    _gpu("l40s", known.L40S, _pcie(4, 32e9), _network(50, rails=2), 64),
    # [MI300X] seven links at once in each direction; xGMI reaches about as much of the wire as NVLink does
    _gpu("mi300x", known.MI300X, LinkSpec("Infinity Fabric", 448e9, 0.70, 2.5e-6), _network(400), 256),
)


def _cpu() -> Preset:
    """One core a rank, gloo over loopback. All figures [CPU]."""
    # Between 2 processes: all-reduce of 64 B 330 to 400 us, all-gather and permute 140 to 350; of 16 MiB: all-gather
    # 1.25, reduce-scatter 0.76, all-reduce 0.88, permute 2.1 GB/s each way.
    loopback = LinkSpec("gloo over loopback", 1e9, 1.0, 1e-4)
    ethernet = LinkSpec("gloo over 10 Gbit/s Ethernet", 1.25e9, 0.7, 1.5e-4)  # not measured
    return Preset("cpu", "", known.X86_CORE, loopback, ethernet, 4 * GIB, 1e-4)


PRESETS: dict[str, Preset] = {preset.name: preset for preset in (*_GPUS, _cpu())}
