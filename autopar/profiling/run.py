"""`autopar.profile`: measures the devices and links that are present, and describes them as a ClusterSpec.

    one process               its device; links are not measured, so the file describes one device
    under torchrun            all ranks measure their device at the same time, then the collectives between them

On CUDA devices times are read from events after a warm-up; collectives go over NCCL. On CPU over gloo.
"""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from autopar.cluster import ClusterSpec, LinkSpec
from autopar.curves import CollectiveCurve, OpCurve
from autopar.errors import RuntimeFailure
from autopar.machine import host_memory_bytes, local_counts
from autopar.profiling.clock import Clock
from autopar.profiling.links import all_groups, mean_over_ranks, measure_collectives
from autopar.profiling.ops import measure_attention, measure_launches, measure_ops, measure_optimizer
from autopar.profiling.spec import DeviceFacts, Measured, check_facts, device_spec, link_spec, rounded
from autopar.profiling.steps import measure_parameter_overhead
from autopar.runtime.world import device_mesh, join_world

CPU_DTYPES = ("float32", "float64", "bfloat16")
CUDA_DTYPES = ("float32", "bfloat16", "float16", "float64")
BUDGET_S, QUICK_BUDGET_S = 0.05, 0.008

Progress = Callable[[str], None]


def profile(*, quick: bool = False, progress: Progress | None = None) -> ClusterSpec:
    """Measure what this process, or what torchrun, runs on; the same spec is returned on every rank.

    quick: a tenth of the time, with fewer ops, sizes and repetitions: good enough to try things out.
    progress: is told what is being measured, on rank 0.
    Raises RuntimeFailure where the processes do not fit the devices.
    """
    world, per_node = local_counts() if "WORLD_SIZE" in os.environ else (1, 1)
    device = _own_device(per_node)
    join_world(world, device.type)
    clock = Clock(device, QUICK_BUDGET_S if quick else BUDGET_S)
    tell = progress if progress is not None and (world == 1 or dist.get_rank() == 0) else _silent
    measured = _measure_device(clock, world, quick, tell)
    links, launch_s = _measure_links(clock, world, per_node, quick, tell) if world > 1 else ((), 0.0)
    if world == 1:
        tell("links are not measured: there is one process; start several with torchrun to measure them")
    spec = _spec(device, measured, world, per_node, links, launch_s)
    tell("a program's own overhead")
    overhead_s = measure_parameter_overhead(clock, spec)
    if world > 1:
        overhead_s = mean_over_ranks(clock, [overhead_s])[0]
    return replace(spec, device=replace(spec.device, parameter_overhead_s=rounded(overhead_s)))


def summary(cluster: ClusterSpec) -> str:
    """What was measured, on a screen."""
    device = cluster.device
    rates = ", ".join(f"{rate / 1e9:.4g} GFLOP/s {dtype}" for dtype, rate in device.peak_flops_per_s)
    lines = [
        f"{cluster.devices} x {device.name}: {rates}",
        f"memory {device.memory_bytes_per_s / 1e9:.4g} GB/s, an op at least {device.launch_overhead_s * 1e6:.3g} us",
    ]
    for link in cluster.links:
        rate, hop = link.reached_bytes_per_s / 1e9, link.latency_s * 1e6
        lines.append(f"{link.name}: {rate:.4g} GB/s a device, {hop:.3g} us a hop")
    if not cluster.links:
        lines.append("links: not measured, as there was one process; start several with torchrun to measure them")
    return "\n".join(lines)


def leave() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _measure_device(clock: Clock, world: int, quick: bool, tell: Progress) -> Measured:
    dtypes: tuple[str, ...] = CUDA_DTYPES if clock.device.type == "cuda" else CPU_DTYPES
    tell("launches")
    launches = measure_launches(clock)
    measured = Measured(
        launch_s=launches.op_s,
        view_s=launches.view_s,
        ops=(
            *measure_ops(clock, dtypes, launches.cold_s, quick, tell),
            *_tf32(clock, launches.cold_s, tell),
            measure_optimizer(clock, _parameter_maker(clock, world), quick, tell),
        ),
        attention=measure_attention(clock, dtypes[:1] if quick else dtypes, launches.cold_s, quick, tell),
    )
    return measured if world == 1 else _averaged(clock, measured)


def _tf32(clock: Clock, cold_s: float, tell: Progress) -> tuple[OpCurve, ...]:
    """Matrix products of float32 with TF32 switched on, on CUDA devices; the setting is put back."""
    if clock.device.type != "cuda":
        return ()
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        curves = measure_ops(clock, ("float32",), cold_s, True, tell)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return tuple(replace(c, dtype="tf32") for c in curves if c.op in ("mm", "matmul"))


def _parameter_maker(clock: Clock, world: int) -> Callable[[torch.Tensor], torch.Tensor]:
    if world == 1:
        return lambda tensor: tensor
    mesh = device_mesh(clock.device.type, (world,))
    return lambda tensor: DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


def _averaged(clock: Clock, measured: Measured) -> Measured:
    """The mean of what the ranks measured side by side."""
    flat = [measured.launch_s, measured.view_s]
    flat += [seconds for curve in measured.ops for _, seconds in curve.points]
    flat += [s for a in measured.attention for s in (a.overhead_s, 1 / a.flops_per_s, 1 / a.bytes_per_s)]
    counts = mean_over_ranks(clock, [float(len(flat))])
    if counts[0] != len(flat):
        raise RuntimeFailure("the ranks could not measure the same ops: start them on equal devices")
    values = iter(mean_over_ranks(clock, flat))
    launch_s, view_s = next(values), next(values)
    ops = tuple(OpCurve(c.op, c.dtype, tuple((size, next(values)) for size, _ in c.points)) for c in measured.ops)
    attention = tuple(
        replace(a, overhead_s=next(values), flops_per_s=1 / next(values), bytes_per_s=1 / next(values))
        for a in measured.attention
    )
    return Measured(launch_s, view_s, ops, attention)


def _measure_links(
    clock: Clock, world: int, per_node: int, quick: bool, tell: Progress
) -> tuple[tuple[LinkSpec, ...], float]:
    """Links, innermost first, and the launch of a collective.

    Where a node runs one process there is no link inside it; the one between nodes then stands for both.
    """
    inside: list[CollectiveCurve] = []
    between: list[CollectiveCurve] = []
    for groups in all_groups(world, per_node):
        curves = measure_collectives(clock, groups, quick, tell)
        (inside if groups.inside else between).extend(curves)
    backend = "NCCL" if clock.device.type == "cuda" else "gloo"
    found = [link_spec(f"{backend} inside a node", inside)] if inside else []
    if between:
        found.append(link_spec(f"{backend} between nodes", between))
    if not inside:
        found = [found[0], found[0]]
    return tuple(link for link, _ in found), found[0][1]


def _spec(
    device: torch.device, measured: Measured, world: int, per_node: int, links: tuple[LinkSpec, ...], launch_s: float
) -> ClusterSpec:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return ClusterSpec(
        name=f"measured {today}, torch {torch.__version__}",
        nodes=world // per_node,
        devices_per_node=per_node,
        host_memory_bytes=host_memory_bytes(),
        collective_launch_s=rounded(launch_s),
        device=device_spec(check_facts(_facts(device, per_node)), measured),
        links=links,
    )


def _own_device(per_node: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if per_node > count:
        raise RuntimeFailure(
            f"torchrun started {per_node} processes on a node with {count} GPUs; use --nproc-per-node {count}, or "
            "CUDA_VISIBLE_DEVICES= to measure CPUs"
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _facts(device: torch.device, per_node: int) -> DeviceFacts:
    """Memory: the GPU's own, and what is not free of it now beside torch's pool; or a share of the host's, and what
    this process, with torch and its communication loaded, takes of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        return DeviceFacts(name, "cuda", total, total - free - torch.cuda.memory_reserved(device))
    threads = torch.get_num_threads()
    name = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''} a process"
    return DeviceFacts(name, "cpu", host_memory_bytes() // per_node, _resident_bytes())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _silent(text: str) -> None:
    """Nobody asked for progress."""
