"""The keys and values of a layout in text, as the command line has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autopar.errors import LayoutError


def read_string(text: str) -> dict[str, Any]:
    """The keys and values of `tp=8,pp=2,sp=true`."""
    given: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise LayoutError(f"layout: expected KEY=VALUE,KEY=VALUE, found {part.strip()!r} in {text!r}")
        if key in given:
            raise LayoutError(f"layout: {key} is given twice; keep one")
        given[key] = _READ.get(key, _read_integer)(value)
    return given


def _read_integer(text: str) -> int | str:
    return int(text) if text.removeprefix("-").isdecimal() else text


def _read_bool(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _read_dtype(text: str) -> str | None:
    return None if text.lower() == "none" else text


def _read_count(text: str) -> int | str | None:
    return None if text.lower() == "none" else _read_integer(text)


def _read_load(text: str) -> Any:
    """1.2, or rows of each expert: 90:110:100:100."""
    try:
        rows = [float(part) for part in text.split(":")]
    except ValueError:
        return text
    return rows[0] if len(rows) == 1 else rows


_READ: dict[str, Callable[[str], Any]] = {
    "sp": _read_bool,
    "recompute": str.lower,
    "schedule": str.lower,
    "grad_dtype": _read_dtype,
    "recompute_blocks": _read_count,
    "expert_load": _read_load,
    "cut": _read_dtype,
}


def written(value: Any) -> str:
    """A value of a layout as `read_string` takes it."""
    if isinstance(value, (list, tuple)):
        return ("/" if isinstance(value[0], int) else ":").join(f"{one:g}" for one in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
