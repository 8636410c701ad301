"""The mesh that pinned degrees ask for, and what each of its axes is for.

A degree is a number of ranks, {"tp": 4}, or the sizes of several axes of one role,
{"tp": (2, 2)}: each is an axis of the mesh on which every op is decided by itself, so that
rows, columns and contractions of a product may be cut by different ones (2D, 2.5D and 3D
tensor parallelism). An axis of the role "ep" cuts the experts of mixture-of-experts layers;
what else it cuts, tokens above all, is for the planner to decide. Where the other degrees fill
the devices, expert ranks are the context ranks, if there are as many, or some of the data ranks,
as in `autopar.Layout`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from autopar.errors import PinError

ROLES = ("dp", "cp", "ep", "tp")  # outer axes first
_FREE = ("dp", "tp")  # that take what devices the others leave
UNSUPPORTED = ("pp", "vpp")
MOST_AXES = 4  # of a mesh: the states of a tensor, and the choices of an op, grow with the power of it

Sizes = tuple[int, ...]


def degree(key: str, value: Any) -> Sizes:
    """The sizes of the axes that a pinned degree asks for; raises PinError."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not sizes or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sizes):
        what = "a positive integer, or one for each of several axes such as (2, 2)" if key in ROLES else "an integer"
        raise PinError(f"pin {key!r} must be {what}, got {value!r}")
    if key in UNSUPPORTED and sizes != (1,):
        raise PinError(f"pin {key!r}: only degree 1 is available yet, got {value}; use {' and '.join(ROLES)}")
    return sizes


def ranks(value: Any) -> int | None:
    """How many ranks a pinned degree asks for, by one axis or several; None if it is no degree."""
    sizes = value if isinstance(value, (tuple, list)) else (value,)
    return math.prod(sizes) if all(isinstance(s, int) for s in sizes) else None


def pinned_mesh(degrees: Mapping[str, Sizes], shape: Any, devices: int) -> tuple[Sizes | None, tuple[str | None, ...]]:
    """The mesh, None if nothing fixes it, and per axis its role, None if it has none; raises PinError."""
    if shape is not None:
        mesh = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
        if not all(isinstance(s, int) and s >= 1 for s in mesh) or math.prod(mesh) != devices:
            raise PinError(f"pin 'mesh': sizes must multiply to {devices} devices, got {shape!r}")
        _check_axes(mesh)
        return mesh, (None,) * len(mesh)
    asked = {role: degrees[role] for role in ROLES if role in degrees}
    if not asked:
        return None, ()
    asked = _experts_of_others(asked, devices)
    product = math.prod(math.prod(sizes) for sizes in asked.values())
    rest = next((role for role in _FREE if role not in asked), None)
    if devices % product or (rest is None and product != devices):
        text = " x ".join(f"{role}={'x'.join(map(str, sizes))}" for role, sizes in asked.items())
        raise PinError(f"pinned degrees {text} = {product} do not make {devices} devices")
    if rest is not None:
        asked[rest] = (devices // product,)
    pairs = [(size, role) for role in ROLES for size in asked.get(role, ()) if size > 1]
    mesh = tuple(size for size, _ in pairs)
    _check_axes(mesh)
    return mesh, tuple(role for _, role in pairs)


def _experts_of_others(asked: dict[str, Sizes], devices: int) -> dict[str, Sizes]:
    """Degrees as a layout has them, whose expert ranks are its context ranks or some of its data ranks: these apart."""
    data, experts = math.prod(asked.get("dp", (1,))), math.prod(asked.get("ep", (1,)))
    others = math.prod(math.prod(sizes) for role, sizes in asked.items() if role != "ep")
    if others != devices or experts == 1:
        return asked
    if on_context(asked, devices):
        return {role: sizes for role, sizes in asked.items() if role != "ep"}
    return asked if data % experts else {**asked, "dp": (data // experts,)}


def on_context(degrees: Mapping[str, Sizes], devices: int) -> bool:
    """Whether the context ranks are the expert ranks, too: as many of one as of the other, and others fill the devices
    (of what is left out: any number of data ranks)."""
    experts = math.prod(degrees.get("ep", (1,)))
    others = math.prod(math.prod(sizes) for role, sizes in degrees.items() if role != "ep" and role in ROLES)
    return experts > 1 and degrees.get("cp") == degrees.get("ep") and others == devices


def _check_axes(mesh: Sizes) -> None:
    if len(mesh) > MOST_AXES:
        sizes = "x".join(map(str, mesh))
        raise PinError(f"the pins ask for a mesh of {len(mesh)} axes, {sizes}; at most {MOST_AXES} are planned")
