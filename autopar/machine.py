"""The machine that this process runs on: what torchrun started, GPUs, host memory."""

from __future__ import annotations

import os
from pathlib import Path

from autopar.errors import RuntimeFailure


def local_counts() -> tuple[int, int]:
    """(processes, processes on this node) that torchrun started; RuntimeFailure outside torchrun."""
    world, per_node = _torchrun_count("WORLD_SIZE"), _torchrun_count("LOCAL_WORLD_SIZE")
    if world % per_node:
        raise RuntimeFailure(
            f"WORLD_SIZE={world} is no multiple of LOCAL_WORLD_SIZE={per_node}: start the same number of "
            "processes on every node"
        )
    return world, per_node


def _torchrun_count(variable: str) -> int:
    text = os.environ.get(variable)
    if text is None:
        raise RuntimeFailure(
            f"ClusterSpec.local(): {variable} is not set, so this process was not started by torchrun; launch with "
            "`torchrun --nproc-per-node N script.py`, or ask for one process with ClusterSpec.preset('cpu', gpus=1)"
        )
    if not text.isdecimal() or int(text) < 1:
        raise RuntimeFailure(f"ClusterSpec.local(): {variable}={text!r} is not a positive number; launch with torchrun")
    return int(text)


def local_gpu_names() -> list[str]:
    import torch  # only here: describing a cluster takes no torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def host_memory_bytes() -> int:
    """Memory of this host, or of the container (cgroup v2) where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdecimal() else total
