"""Checks of described numbers: one rule per field, one clear ClusterSpecError per mistake."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, get_origin, get_type_hints

from autopar.errors import ClusterSpecError

_WANTED = {
    "name": "a text that is not empty",
    "count": "a whole number of at least 1",
    "bytes": "a whole number of at least 0",
    "positive": "a finite number above 0",
    "non-negative": "a finite number of at least 0",
    "fraction": "a number above 0 and at most 1",
    "at-least-one": "a finite number of at least 1",
}
_OPTIONAL = "optional "
_SHOWN_KEYS = 10  # where none of them is in question


# Types of dataclass fields that `checked` checks.
Name = Annotated[str, "name"]
Count = Annotated[int, "count"]
Bytes = Annotated[int, "bytes"]
Positive = Annotated[float, "positive"]
NonNegative = Annotated[float, "non-negative"]
Fraction = Annotated[float, "fraction"]
AtLeastOne = Annotated[float, "at-least-one"]
OptionalCount = Annotated[int | None, "optional count"]
OptionalNonNegative = Annotated[float | None, "optional non-negative"]


@cache
def _rules(cls: type) -> dict[str, str]:
    hints = get_type_hints(cls, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}


def checked(instance: Any, where: str) -> None:
    """Check, and bring to int or float, the fields of a frozen dataclass that have one of the types above."""
    for name, rule in _rules(instance.__class__).items():
        object.__setattr__(instance, name, checked_value(getattr(instance, name), rule, f"{where}.{name}"))


def checked_value(value: object, rule: str, where: str) -> Any:
    """The value if it obeys the rule (as int for whole numbers, else float), or ClusterSpecError naming `where`."""
    wanted = _WANTED[rule.removeprefix(_OPTIONAL)]
    if rule.startswith(_OPTIONAL):
        if value is None:
            return None
        rule, wanted = rule.removeprefix(_OPTIONAL), f"{wanted}, or null"
    if rule == "name":
        if isinstance(value, str) and value.strip():
            return value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = _finite(value)
        if number is not None and _obeys(number, rule):
            return int(value) if rule in ("count", "bytes") else number
    raise ClusterSpecError(f"{where} is {shown(value)}; use {wanted}")


def _finite(value: int | float) -> float | None:
    try:
        number = float(value)
    except OverflowError:  # an int of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def _obeys(number: float, rule: str) -> bool:
    if rule in ("count", "bytes"):
        return number.is_integer() and number >= (1 if rule == "count" else 0)
    if rule == "fraction":
        return 0 < number <= 1
    if rule == "at-least-one":
        return number >= 1
    return number > 0 if rule == "positive" else number >= 0


def shown(value: object) -> str:
    """A value in an error: short, however large or deep it is."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a number out of all bounds"
    try:
        text = " ".join(repr(value).split())
    except (RecursionError, ValueError):  # nested too deep, or an int of thousands of digits in it
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_object(
    data: object, keys: Sequence[str], where: str, rule: str | None = None, *, required: bool = False
) -> dict[str, Any]:
    """A mapping (or pairs) as a dict with no other keys than `keys`, all of them if `required`, values by `rule`.

    ClusterSpecError names the wrong key, the nearest right one, and all that are accepted.
    """
    if isinstance(data, tuple):
        data = dict(data)
    if not isinstance(data, Mapping):
        more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
        first = ", ".join(keys[:_SHOWN_KEYS])
        raise ClusterSpecError(f"{where} is {shown(data)}; use an object with the keys {first}{more}")
    for key in data:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ClusterSpecError(f"{where} has an unknown key {key!r}{hint} (accepted: {', '.join(keys)})")
    missing = [key for key in keys if key not in data] if required else []
    if missing:
        raise ClusterSpecError(f"{where} lacks {', '.join(missing)}; add it (accepted: {', '.join(keys)})")
    if not data:
        raise ClusterSpecError(f"{where} is empty; give at least one of {', '.join(keys)}")
    return {k: v if rule is None else checked_value(v, rule, f"{where}.{k}") for k, v in data.items()}
