"""The leaves of arguments and results, with paths that a person can read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MethodType
from typing import Any

from autopar._torch_compat import pytree
from autopar.errors import TraceError
from autopar.tracing.objects import attribute_names, opened


def input_leaves(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a call's arguments by path, in the order of the pytree (args, kwargs).

    A path starts with the name in the signature of `forward`, however the argument was passed, so that
    `f(x)` and `f(input_ids=x)` agree: "input_ids", "batch.mask", "args[0]" (of `*args`).
    Raises TraceError where the call doesn't fit the signature.
    """
    try:
        _signature(forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(f"the arguments don't fit the model's forward: {error}; change example_inputs") from None
    names = _positional_names(forward, len(args))
    roots = [*zip(names, args, strict=True), *kwargs.items()]
    return {path: leaf for root, value in roots for path, leaf in _walk(root, value)}


def output_leaves(value: Any) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """The leaves of a model's result with paths ("loss", "[0].logits"; "output" for a lone leaf), and its structure.

    Objects that hold tensors are opened: their attributes are leaves too ("cache.layers[0].keys").
    """
    value = opened(value)
    leaves, spec = pytree.tree_flatten(value)
    named = list(_walk("", value))
    assert len(leaves) == len(named)
    return [(path or "output", leaf) for path, leaf in named], spec


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """Of a function, or of a method: every micro-batch of every step asks."""
    function = getattr(forward, "__func__", None)
    return inspect.signature(forward) if function is None else _method_signature(function)


@cache
def _method_signature(function: Callable[..., Any]) -> inspect.Signature:
    """As of a method of some object; the object itself is not held."""
    return inspect.signature(MethodType(function, object()))


def _positional_names(forward: Callable[..., Any], count: int) -> list[str]:
    parameters = list(_signature(forward).parameters.values())
    names: list[str] = []
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(count - len(names))]
    return names[:count]


def _walk(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Leaves in pytree order; one level at a time, so that registered classes without key functions work too."""
    children, spec = pytree.tree_flatten(value, is_leaf=lambda x: x is not value)
    if spec.is_leaf():
        yield path, value
        return
    if isinstance(value, Mapping) and len(value) == len(children):
        keys = [_keyed(path, str(key)) for key in value]
    elif (names := attribute_names(value)) is not None:
        keys = [_keyed(path, name) for name in names]
    elif hasattr(value, "_fields"):
        keys = [_keyed(path, name) for name in value._fields]
    else:
        keys = [f"{path}[{i}]" for i in range(len(children))]
    for key, child in zip(keys, children, strict=True):
        yield from _walk(key, child)


def _keyed(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
