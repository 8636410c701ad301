"""The processes of a job: starting the process group, building meshes, agreeing on one plan."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import autopar.errors
from autopar.errors import AutoparError, PlanMismatch, RuntimeFailure
from autopar.runtime.failure import naming_dead_ranks, start_heartbeat


def join_world(devices: int, device_type: str) -> None:
    """Make sure that exactly `devices` processes run together; raises RuntimeFailure or PlanMismatch."""
    if devices == 1:
        return
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise RuntimeFailure(
                f"this program runs on {devices} ranks, but it was not started by torchrun; "
                f"start it with: torchrun --nproc-per-node {devices} your_script.py"
            )
        if device_type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    if dist.get_world_size() != devices:
        raise PlanMismatch(
            f"the plan is for {devices} ranks, but {dist.get_world_size()} are running; start torchrun with "
            f"{devices} processes in all, or plan again for {dist.get_world_size()} devices"
        )
    start_heartbeat()


@cache
def device_mesh(device_type: str, shape: tuple[int, ...]) -> DeviceMesh:
    """The DeviceMesh of a plan; axes are named x0, x1, ..."""
    return init_device_mesh(device_type, shape, mesh_dim_names=tuple(f"x{i}" for i in range(len(shape))))


def agree(make: Callable[[], str], device_type: str) -> str:
    """Rank 0 makes a text, all ranks get it; an error of rank 0 is raised on all ranks."""
    message = ""
    if dist.get_rank() == 0:
        try:
            message = json.dumps({"text": make()})
        except AutoparError as error:
            message = json.dumps({"error": type(error).__name__, "message": str(error)})
        except BaseException as error:  # the others must not wait for a rank that is about to die
            _broadcast(json.dumps({"error": "RuntimeFailure", "message": f"rank 0 failed: {error!r}"}), device_type)
            raise
    data = json.loads(_broadcast(message, device_type))
    if "error" in data:
        raise getattr(autopar.errors, data["error"])(data["message"])
    return str(data["text"])


def check_same_random_state() -> None:
    """Raise RuntimeFailure, on all ranks, unless their default random generators are in one state."""
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    found: list[str | None] = [None] * dist.get_world_size()
    with naming_dead_ranks("all ranks"):
        dist.all_gather_object(found, digest)
    others = [rank for rank, other in enumerate(found) if other != found[0]]
    if others:
        raise RuntimeFailure(
            f"the model draws random numbers (dropout), but rank {others[0]} has another random state than rank 0; "
            "call torch.manual_seed with the same seed on every rank before the program runs"
        )


def _broadcast(text: str, device_type: str) -> str:
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    payload = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(device)
    size = torch.tensor([payload.numel()], device=device)
    with naming_dead_ranks(device):
        dist.broadcast(size, src=0)
        if dist.get_rank() != 0:
            payload = torch.empty(int(size.item()), dtype=torch.uint8, device=device)
        dist.broadcast(payload, src=0)
    return bytes(payload.cpu().tolist()).decode()
