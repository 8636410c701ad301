"""Finds the list of identical layers in a model, and makes the model with fewer of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

LEAST_LAYERS = 4  # below, tracing three layers and two saves nothing


def repeated_layers(model: nn.Module) -> tuple[str, int] | None:
    """(path, length) of the model's one list of identical layers; None if there is none or more than one."""
    found = layer_runs(model)
    return (found.path, found.count) if found is not None and len(found.lengths) == 1 else None


@dataclass(frozen=True)
class LayerRuns:
    """A list of layers. path: of it. lengths: of the stretches of layers that are alike, first to last."""

    path: str
    lengths: tuple[int, ...]

    @property
    def count(self) -> int:
        """Of all layers."""
        return sum(self.lengths)

    def kept(self) -> tuple[int, ...]:
        """The layers that a sample needs: of every stretch the first, one from its middle, and the last.

        All of them, if one of those would stand where the model has a layer of another kind: it may go by the place.
        """
        found: list[int] = []
        kinds: list[int] = []
        for kind, (start, length) in enumerate(zip(self._starts(), self.lengths, strict=True)):
            found += sorted({start, start + length // 2, start + length - 1})
            kinds += [kind] * length
        same = all(kinds[place] == kinds[layer] for place, layer in enumerate(found))
        return tuple(found) if same else tuple(range(self.count))

    def stands(self) -> tuple[int, ...]:
        """For every layer, which of the kept ones stands for it, by its place among them; each for itself first."""
        kept, found = self.kept(), []
        for start, length in zip(self._starts(), self.lengths, strict=True):
            middle = start + length // 2
            found += [kept.index(i if i in kept else middle) for i in range(start, start + length)]
        return tuple(found)

    def _starts(self) -> tuple[int, ...]:
        return tuple(accumulate((0, *self.lengths[:-1])))


def layer_runs(model: nn.Module) -> LayerRuns | None:
    """The model's one list of layers; None if there is none or more than one, or its layers share parameters."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) >= LEAST_LAYERS]
    outer = [(path, m) for path, m in lists if not any(path.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1 or _shares_parameters(outer[0][1]):
        return None
    path, layers = outer[0]
    starts: list[int] = []
    for index, layer in enumerate(layers):
        if not starts or not _alike(layers[starts[-1]], layer, (starts[-1], index)):
            starts.append(index)
    return LayerRuns(path, tuple(b - a for a, b in pairwise([*starts, len(layers)])))


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


def _alike(first: nn.Module, other: nn.Module, index: tuple[int, int]) -> bool:
    """Whether two layers are the same but for their weights and the numbers that say which layer it is.

    index: of both.
    """
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


def _same_attributes(a: nn.Module, b: nn.Module, index: tuple[int, int]) -> bool:
    inner = {"_parameters", "_buffers", "_modules"}
    ours = {k: v for k, v in vars(a).items() if k not in inner}
    theirs = {k: v for k, v in vars(b).items() if k not in inner}
    if ours.keys() != theirs.keys():
        return False
    return all(_same_value(v, theirs[k], index) for k, v in ours.items())


def _same_value(a: Any, b: Any, index: tuple[int, int]) -> bool:
    """Equal, or the layer's number, or objects that only wrap such (bound methods of the layers themselves)."""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, int) and not isinstance(a, bool) and (a, b) == index:
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
