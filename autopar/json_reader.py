"""Reads untrusted JSON field by field: every field by name and type, every mistake one PlanError that says where."""

from __future__ import annotations

import math
from typing import Any

from autopar.errors import PlanError


class Reader:
    """A JSON object whose fields are taken by name and type, and that says what is wrong with them."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise PlanError(f"{where}: expected an object, found {type(data).__name__}")
        self.data, self.where = data, where

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The field, of that type."""
        if key not in self.data:
            raise PlanError(f"{self.where}: field {key!r} is missing; the file is truncated or not a plan")
        value = self.data[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise PlanError(f"{self.where}: field {key!r} has the wrong type ({type(value).__name__})")
        return value

    def sub(self, key: str) -> Reader:
        """The object in the field."""
        return Reader(self.get(key, dict), f"{self.where}: {key}")

    def subs(self, key: str) -> list[Reader]:
        """The objects in the list in the field."""
        return [Reader(item, f"{self.where}: {key}[{i}]") for i, item in enumerate(self.get(key, list))]

    def strings(self, key: str) -> tuple[str, ...]:
        """The strings in the list in the field."""
        items = self.get(key, list)
        if not all(isinstance(i, str) for i in items):
            raise PlanError(f"{self.where}: field {key!r} must hold strings")
        return tuple(items)

    def ints(self, key: str) -> tuple[int, ...]:
        """The integers in the list in the field."""
        items = self.get(key, list)
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in items):
            raise PlanError(f"{self.where}: field {key!r} must hold integers")
        return tuple(items)

    def number(self, key: str) -> float:
        """The number in the field."""
        return float(self.get(key, (int, float)))

    def optional_number(self, key: str) -> float | None:
        """The number in the field, or None."""
        return None if self.data.get(key) is None else self.number(key)

    def check(self, key: str, good: bool, what: str) -> None:
        """Refuse the field unless it is good."""
        if not good:
            raise PlanError(f"{self.where}: field {key!r}: {what}, found {str(self.data[key])[:80]}")


def finite(text: str) -> float:
    """A float; ValueError for infinity and NaN, which JSON does not have."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is out of bounds")
    return number
