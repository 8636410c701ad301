"""Results that hold tensors in plain Python objects, such as the caches of transformers.

pytree takes an object of an unknown class for a leaf. `opened` puts a container of ours in
its place, whose children are the object's attributes; rebuilt from other tensors it gives
an object of the same class again. Nothing is registered for classes that are not ours, so
other users of pytree in the process see no change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from autopar._torch_compat import pytree


@dataclass(frozen=True)
class _Opened:
    """The attributes of an object of class `cls`."""

    cls: type
    attributes: dict[str, Any]


def _flatten(opened: _Opened) -> tuple[list[Any], Any]:
    return list(opened.attributes.values()), (opened.cls, tuple(opened.attributes))


def _rebuild(values: Any, context: Any) -> Any:
    cls, names = context
    made = cls.__new__(cls)
    made.__dict__.update(zip(names, values, strict=True))
    return made


def _with_keys(opened: _Opened) -> tuple[list[tuple[Any, Any]], Any]:
    values, context = _flatten(opened)
    return [(pytree.GetAttrKey(name), v) for name, v in zip(opened.attributes, values, strict=True)], context


pytree.register_pytree_node(_Opened, _flatten, _rebuild, flatten_with_keys_fn=_with_keys)


def attribute_names(value: Any) -> list[str] | None:
    """The names of an opened object's attributes, in the order of its children; None for anything else."""
    return list(value.attributes) if isinstance(value, _Opened) else None


def opened(value: Any) -> Any:
    """`value` with every object that holds tensors, directly or further in, opened (see the module)."""
    return pytree.tree_map(lambda leaf: _open(leaf, ()), value)


def _open(leaf: Any, around: tuple[int, ...]) -> Any:
    attributes = getattr(leaf, "__dict__", None)
    if isinstance(leaf, (torch.Tensor, torch.nn.Module, type)) or not isinstance(attributes, dict):
        return leaf
    if id(leaf) in around:  # an object that refers to itself stays closed
        return leaf
    inside = {
        name: pytree.tree_map(lambda child: _open(child, (*around, id(leaf))), child)
        for name, child in attributes.items()
    }
    found = pytree.tree_leaves(inside)
    return _Opened(type(leaf), inside) if any(isinstance(x, torch.Tensor) for x in found) else leaf
