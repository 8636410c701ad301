"""What a person wants of a cluster, in words: "1T tokens in 30 days under $5M"."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autopar.errors import AutoparError

ACCEPTED = (
    '"1T tokens in 30 days", "300B tokens under $2M", "1T tokens in 2 weeks for 5M USD" (or samples for tokens), or '
    '"step in 2.5 s"; K, M, B and T are 10^3 to 10^12; times are ms, s, minutes, hours, days, weeks or years'
)

_FACTORS = {
    "": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12,
}  # fmt: skip
_SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0, "y": 365 * 86400.0}
_UNITS = {
    "millisecond": "ms", "sec": "s", "second": "s", "minute": "min", "hour": "h", "hr": "h", "day": "d", "week": "w",
    "year": "y",
}  # fmt: skip

_NUMBER = r"(\d[\d,]*(?:\.\d+)?(?:e\+?\d+)?)\s*(k|m|b|t|thousand|million|billion|trillion|)"
_AMOUNT = re.compile(_NUMBER + r"\s*(tokens?|samples?)\b")
_STEP = re.compile(r"(?:a\s+)?step\b")
_TIME = re.compile(r"\s*(?:in|within)\s+(\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)\s*([a-z]+)\b")
_MONEY = re.compile(rf"\s*(?:for|under)\s+(?:(\$)\s*{_NUMBER}|{_NUMBER}\s*(usd|dollars)\b)(?![\w.])")


@dataclass(frozen=True)
class Target:
    """step_s: the longest that a step may take. amount: how many tokens or samples (`unit`) are to be trained on, and
    in how many seconds, for how many USD. None is no limit. text: as it was given.
    """

    text: str
    step_s: float | None = None
    amount: float | None = None
    unit: str | None = None
    duration_s: float | None = None
    budget_usd: float | None = None

    def __str__(self) -> str:
        return self.text


def parse_target(text: str | Target) -> Target:
    """Read a target; AutoparError that says what is accepted for anything else."""
    if isinstance(text, Target):
        return text
    if not isinstance(text, str):
        raise AutoparError(f"target {text!r} is no text; use {ACCEPTED}")
    rest = text.strip().lower()
    step, amount = _STEP.match(rest), _AMOUNT.match(rest)
    head = step or amount
    if head is None:
        raise _refused(text, "it names neither tokens, samples nor a step")
    limits = _limits(text, rest[head.end() :])
    if amount is not None:
        if not limits:
            raise _refused(text, "it says neither in what time nor for how much")
        number = _positive(text, amount[1], _FACTORS[amount[2]])
        return Target(text.strip(), amount=number, unit=amount[3].rstrip("s") + "s", **limits)
    if "budget_usd" in limits:
        raise _refused(text, "a step has no budget: name how many tokens or samples the money is for")
    if not limits:
        raise _refused(text, "it does not say how long a step may take")
    return Target(text.strip(), step_s=limits["duration_s"])


def _limits(text: str, rest: str) -> dict[str, float]:
    """Time and money, each at most once, in either order, and nothing else."""
    readers: Mapping[str, tuple[re.Pattern[str], Callable[[str, re.Match[str]], float]]] = {
        "duration_s": (_TIME, _time_s),
        "budget_usd": (_MONEY, _money_usd),
    }
    found: dict[str, float] = {}
    while rest.strip():
        for name, (pattern, read) in readers.items():
            match = pattern.match(rest)
            if match:
                if name in found:
                    raise _refused(text, f"{match[0].strip()!r} is a second limit of the same kind")
                found[name], rest = read(text, match), rest[match.end() :]
                break
        else:
            raise _refused(text, f"{rest.strip()!r} is not understood")
    return found


def _time_s(text: str, match: re.Match[str]) -> float:
    word = match[2]
    unit = _UNITS.get(word) or _UNITS.get(word.removesuffix("s")) or word
    if unit not in _SECONDS:
        raise _refused(text, f"{word!r} is no unit of time")
    return _positive(text, match[1], _SECONDS[unit])


def _money_usd(text: str, match: re.Match[str]) -> float:
    number, factor = (match[2], match[3]) if match[1] else (match[4], match[5])
    return _positive(text, number, _FACTORS[factor])


def _positive(text: str, number: str, factor: float) -> float:
    value = float(number.replace(",", "")) * factor
    if not 0 < value < math.inf:
        raise _refused(text, f"{number} is not a positive number")
    return value


def _refused(text: str, why: str) -> AutoparError:
    return AutoparError(f"target {text!r}: {why}; use {ACCEPTED}")
