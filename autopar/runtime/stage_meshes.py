"""The processes of a pipeline: one mesh for each pipeline rank, and the groups that join their equals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from autopar.placements import State
from autopar.runtime.parameters import place, torch_placements
from autopar.runtime.rank_pipeline import Place
from autopar.runtime.world import device_mesh


@dataclass(frozen=True)
class StageMeshes:
    """stages: the mesh of each pipeline rank, of the same shape; one that has no axes is a mesh of one rank.

    place: where this rank is.
    """

    stages: tuple[DeviceMesh, ...]
    place: Place

    @property
    def mine(self) -> DeviceMesh:
        """The mesh that this rank is in."""
        return self.stages[self.place.rank]


@cache
def stage_meshes(device_type: str, ranks: int, mesh: tuple[int, ...]) -> StageMeshes:
    """The meshes of a pipeline over all processes, whose outermost axis is the pipeline. All processes call this."""
    pipeline = device_mesh(device_type, (ranks, *mesh)).get_group(0)
    numbers = torch.arange(dist.get_world_size()).reshape(ranks, *(mesh or (1,)))
    names = tuple(f"x{i}" for i in range(max(1, len(mesh))))
    stages = tuple(DeviceMesh(device_type, numbers[rank], mesh_dim_names=names) for rank in range(ranks))
    mine = stages[dist.get_rank(pipeline)]
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    axes = tuple(mine.get_group(axis).group_name for axis in range(len(mesh)))
    coordinates = tuple((mine.get_coordinate() or [])[: len(mesh)])
    return StageMeshes(stages, Place(pipeline, axes, coordinates, device))


def place_on_stage(source: torch.Tensor, state: State, owner: int, meshes: StageMeshes) -> torch.Tensor:
    """A parameter as a DTensor on the mesh of its stage, from rank 0's values; empty on the ranks of other stages.

    Every process calls this for every parameter, in the same order. owner: pipeline rank. A parameter without values
    (meta device) becomes NaN.
    """
    mesh, rank = meshes.stages[owner], dist.get_rank()
    root = int(mesh.mesh.flatten()[0])
    if root != 0 and not source.is_meta:
        source = _passed_on(source.to(meshes.place.device), root, rank)
    whole = state or ("R",)
    return place(source, whole, mesh) if meshes.mine is mesh else _elsewhere(source, mesh, torch_placements(whole))


def _passed_on(source: torch.Tensor, root: int, rank: int) -> torch.Tensor:
    """What rank 0 has, on rank `root`; other ranks' own."""
    if rank == 0:
        dist.send(source.contiguous(), root)
    if rank == root:
        source = torch.empty_like(source, memory_format=torch.contiguous_format)
        dist.recv(source, 0)
    return source


def _elsewhere(like: torch.Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    """A DTensor of which this rank holds nothing."""
    nothing = torch.empty(0, dtype=like.dtype, device=mesh.device_type)
    stride = torch.empty(like.shape, device="meta").stride()
    return DTensor.from_local(nothing, mesh, placements, run_check=False, shape=like.shape, stride=stride)


def is_here(param: nn.Parameter) -> bool:
    """Whether this rank holds a part of a parameter."""
    return not isinstance(param, DTensor) or param.device_mesh.get_coordinate() is not None
