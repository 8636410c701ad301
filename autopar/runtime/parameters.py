"""Parameters and buffers of a program: under the model's own names, each a DTensor placed as the plan says."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from autopar.placements import State, shard_dim


def torch_placements(state: State) -> list[Placement]:
    """A state in DTensor's words."""
    found: list[Placement] = []
    for placement in state:
        dim = shard_dim(placement)
        found.append(Replicate() if dim is None else Shard(dim))
    return found


def place(source: torch.Tensor, state: State, mesh: DeviceMesh | None) -> torch.Tensor:
    """A parameter's local part, from rank 0's values; NaN where the model has no weights (meta device)."""
    if mesh is None:
        return source
    if source.is_meta:
        whole = torch.empty(source.shape, dtype=source.dtype, device="meta")
        local = distribute_tensor(whole, mesh, torch_placements(state)).to_local()
        filled = torch.full(local.shape, float("nan"), dtype=source.dtype, device=mesh.device_type)
        return DTensor.from_local(filled, mesh, torch_placements(state), run_check=False)
    return distribute_tensor(source.to(mesh.device_type), mesh, torch_placements(state))


def mirror(program: nn.Module, model: nn.Module, world: DeviceMesh | None) -> None:
    """Give `program` the parameters and buffers of `model` under the same names, ties included.

    On a world of several ranks parameters start as replicated DTensors on the model's own storage.
    """
    copies: dict[int, nn.Parameter] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        if id(param) not in copies:
            tensor = param.detach()
            if world is not None:
                tensor = DTensor.from_local(tensor, world, [Replicate()], run_check=False)
            copies[id(param)] = nn.Parameter(tensor, requires_grad=param.requires_grad)
        _register(program, name, copies[id(param)], persistent=True)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            _register(program, f"{prefix}.{name}".lstrip("."), buffer.detach().clone(), persistent)


def _register(program: nn.Module, path: str, tensor: torch.Tensor, persistent: bool) -> None:
    *parents, name = path.split(".")
    module = program
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module._modules[parent]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor, persistent=persistent)


def distribute_loaded(program: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let `load_state_dict` take whole tensors: each is cut like the parameter it is for."""
    own = program.state_dict(keep_vars=True)
    for name, value in list(state_dict.items()):
        target = own.get(name.removeprefix(prefix))
        if isinstance(target, DTensor) and not isinstance(value, DTensor):
            if tuple(value.shape) != tuple(target.shape):
                continue  # load_state_dict reports wrong shapes itself
            moved = value.to(device=target.device, dtype=target.dtype)
            state_dict[name] = distribute_tensor(moved, target.device_mesh, target.placements)
