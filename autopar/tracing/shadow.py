"""A copy of a model in which every tensor is fake.

The user's model is never written to: its modules are copied one by one (the class and
the attributes stay, `__init__` is not run), parameters, buffers and tensor attributes
are replaced by fake tensors of the same shape, stride and dtype, and whatever refers to
a copied module (lists, dicts, bound methods, partials) refers to the copy. All other
objects are shared; tracing doesn't change them, as Dynamo keeps side effects to itself.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from autopar._torch_compat import FakeTensorMode, has_device, is_fake_tensor, is_plain_tensor
from autopar.errors import TraceError


@dataclass
class Shadow:
    """The copy, and what the original holds.

    attributes: name -> original of tensors that are plain attributes; in the copy they are buffers.
    """

    module: nn.Module
    attributes: dict[str, torch.Tensor] = field(default_factory=dict)


def make_shadow(model: nn.Module, mode: FakeTensorMode, device: str | None) -> Shadow:
    """Copy `model` with fake tensors on `device` (if None: where each tensor is, and "cpu" for
    tensors on meta or, being fake, on a device that this build of torch lacks).

    Raises TraceError for tensors that can't be planned (subclasses, sparse, complex with gradient, zero-size).
    """
    copier = _Copier(mode, device)
    copier.registered_tensors(model)
    shadow = Shadow(copier.module(model))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                shadow.attributes[f"{path}.{name}" if path else name] = value
    return shadow


def fake_like(tensor: torch.Tensor, mode: FakeTensorMode, device: str | None) -> torch.Tensor:
    """A fake tensor of the same shape, stride and dtype, without gradient, on `device` (see `make_shadow`)."""
    own = tensor.device if has_device(tensor.device.type) else "cpu"
    with mode:
        return torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device or own)


class _Copier:
    def __init__(self, mode: FakeTensorMode, device: str | None) -> None:
        self.mode, self.device = mode, device
        self.done: dict[int, Any] = {}
        self.alive: list[Any] = []  # originals, so that no id is used twice
        self.open: set[int] = set()  # containers being copied: one may hold itself
        self.registered: set[int] = set()  # ids of the modules that the model registers

    def registered_tensors(self, model: nn.Module) -> None:
        """Copy all that is registered first, so that a list of parameters finds its copies wherever it stands."""
        self.registered = {id(m) for m in model.modules()}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._tensor(tensor, name)

    def module(self, original: nn.Module, path: str = "") -> nn.Module:
        """The copy of a module and of everything in it."""
        if id(original) in self.done:
            return self.done[id(original)]
        if id(original) not in self.registered and any(True for _ in original.parameters()):
            raise TraceError(f"{path[:-1]} is a module that no module registers; use nn.ModuleList or ModuleDict")
        copy = original.__class__.__new__(original.__class__)
        self._remember(original, copy)
        state = dict(vars(original))
        attributes = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        state["_parameters"] = {k: self._tensor(v, f"{path}{k}") for k, v in original._parameters.items()}
        state["_buffers"] = {k: self._tensor(v, f"{path}{k}") for k, v in original._buffers.items()}
        state["_buffers"].update({k: self._tensor(v, f"{path}{k}") for k, v in attributes.items()})
        state["_non_persistent_buffers_set"] = set(original._non_persistent_buffers_set) | set(attributes)
        state["_modules"] = {
            k: None if v is None else self.module(v, f"{path}{k}.") for k, v in original._modules.items()
        }
        special = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", *attributes}
        vars(copy).update({k: v for k, v in state.items() if k not in attributes})
        for name in [k for k in state if k not in special]:
            vars(copy)[name] = self._value(state[name], f"{path}{name}")
        return copy

    def _remember(self, original: Any, copy: Any) -> None:
        self.done[id(original)] = copy
        self.alive.append(original)

    def _tensor(self, tensor: torch.Tensor | None, name: str) -> torch.Tensor | None:
        if tensor is None or id(tensor) in self.done:
            return None if tensor is None else self.done[id(tensor)]
        check_tensor(tensor, f"parameter or buffer {name!r}")
        fake = fake_like(tensor, self.mode, self.device)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        self._remember(tensor, fake)
        return fake

    def _value(self, value: Any, name: str) -> Any:
        """An attribute with modules and parameters in it replaced; the same object where there are none."""
        if isinstance(value, nn.Module):
            return self.module(value, f"{name}.")
        if isinstance(value, torch.Tensor):
            return self._loose_tensor(value, name)
        if id(value) in self.done:
            return self.done[id(value)]
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__, f"{name}."))
        if isinstance(value, functools.partial):
            function, args = self._value(value.func, name), [self._value(v, name) for v in value.args]
            return functools.partial(function, *args, **{k: self._value(v, name) for k, v in value.keywords.items()})
        if type(value) in (list, tuple, dict, OrderedDict, set) and id(value) not in self.open:
            return self._container(value, name)
        return value

    def _container(self, value: Any, name: str) -> Any:
        self.open.add(id(value))
        copy: Any
        if isinstance(value, dict):
            pairs = [(k, self._value(v, f"{name}.{k}")) for k, v in value.items()]
            changed = any(value[k] is not v for k, v in pairs)
            copy = type(value)(pairs)
        else:
            items = [self._value(v, f"{name}[{i}]") for i, v in enumerate(value)]
            changed = any(a is not b for a, b in zip(items, value, strict=True))
            copy = type(value)(items)
        self.open.discard(id(value))
        self._remember(value, copy if changed else value)
        return copy if changed else value

    def _loose_tensor(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """A tensor in a list or dict: a known parameter, or a constant whose value goes into the graph."""
        if id(tensor) in self.done:
            return self.done[id(tensor)]
        if isinstance(tensor, nn.Parameter) or tensor.requires_grad:
            raise TraceError(f"{name} holds a parameter that no module registers; use nn.ParameterList")
        if tensor.device.type == "meta" or is_fake_tensor(tensor):
            raise TraceError(f"{name} is a tensor without values inside a list or dict; register it as a buffer")
        return tensor


def check_tensor(tensor: torch.Tensor, what: str) -> None:
    """Refuse tensors that a plan can't handle; raises TraceError that names `what`."""
    if not is_plain_tensor(tensor):
        kind = f"{type(tensor).__name__}, {tensor.layout}"
        raise TraceError(f"{what} is not a plain dense tensor ({kind}); pass the plain single-device model")
    if tensor.is_complex() and tensor.requires_grad:
        raise TraceError(f"{what} is complex and requires grad, which can't be planned; store real and imaginary parts")
    if tensor.numel() == 0:
        raise TraceError(f"{what} has a dim of size 0 (shape {tuple(tensor.shape)}); remove it")
