"""Finds the list of identical layers in a model, and makes the model with fewer of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

LEAST_LAYERS = 4  # below, tracing three layers and two saves nothing


def repeated_layers(model: nn.Module) -> tuple[str, int] | None:
    """(path, length) of the model's one list of identical layers; None if there is none or more than one."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) >= LEAST_LAYERS]
    outer = [(path, m) for path, m in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1:
        return None
    path, layers = outer[0]
    first = layers[0]
    alike = all(_alike(first, layer, index) for index, layer in enumerate(layers))
    return (path, len(layers)) if alike and not _shares_parameters(layers) else None


def with_layers(model: nn.Module, path: str, indices: list[int]) -> nn.Module:
    """A model that shares everything with `model` but whose list at `path` holds only some of its layers."""
    shallow = _shallow(model)
    parent = shallow
    *parents, name = path.split(".")
    for part in parents:
        parent._modules[part] = _shallow(parent.get_submodule(part))
        parent = parent.get_submodule(part)
    layers = parent.get_submodule(name)
    fewer = nn.ModuleList([layers.get_submodule(str(i)) for i in indices])
    fewer.training = layers.training
    parent._modules[name] = fewer
    return shallow


def _shallow(module: nn.Module) -> nn.Module:
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


def _alike(first: nn.Module, other: nn.Module, index: int) -> bool:
    """Whether two layers are the same but for their weights and the numbers that say which layer it is."""
    pairs = list(zip(first.named_modules(), other.named_modules(), strict=False))
    if len(pairs) != len(list(first.modules())) or len(pairs) != len(list(other.modules())):
        return False
    for (path_a, a), (path_b, b) in pairs:
        if path_a != path_b or type(a) is not type(b) or a.training != b.training:
            return False
        if not _same_tensors(a._parameters, b._parameters) or not _same_tensors(a._buffers, b._buffers):
            return False
        if not _same_attributes(a, b, index):
            return False
    return True


def _same_tensors(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def kind(t: torch.Tensor | None) -> object:
        return None if t is None else (tuple(t.shape), t.stride(), t.dtype, t.requires_grad)

    return {k: kind(t) for k, t in a.items()} == {k: kind(t) for k, t in b.items()}


def _same_attributes(a: nn.Module, b: nn.Module, index: int) -> bool:
    inner = {"_parameters", "_buffers", "_modules"}
    ours = {k: v for k, v in vars(a).items() if k not in inner}
    theirs = {k: v for k, v in vars(b).items() if k not in inner}
    if ours.keys() != theirs.keys():
        return False
    return all(_same_value(v, theirs[k], index) for k, v in ours.items())


def _same_value(a: Any, b: Any, index: int) -> bool:
    """Equal, or the layer's number, or objects that only wrap such (bound methods of the layers themselves)."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, int) and not isinstance(a, bool) and (a, b) == (0, index):
        return True
    if isinstance(a, (int, float, str, bool, tuple, list, dict, set, frozenset, torch.dtype, torch.device, torch.Size)):
        try:
            return bool(a == b)
        except (RuntimeError, ValueError):
            return False
    if isinstance(a, nn.Module):
        return True  # compared as a submodule, or a reference to the same place in another layer
    if callable(a):
        return getattr(a, "__qualname__", None) == getattr(b, "__qualname__", None)
    return bool(a == b)  # objects without an equality of their own differ


def _shares_parameters(layers: nn.ModuleList) -> bool:
    """Whether a parameter or module serves more than one layer."""
    seen: set[int] = set()
    for layer in layers:
        own = {id(x) for x in (*layer.modules(), *layer.parameters())}
        if seen & own:
            return True
        seen |= own
    return False
