"""Seconds, bytes and money for people."""

from __future__ import annotations


def seconds_text(seconds: float) -> str:
    """Seconds, milliseconds or microseconds."""
    if abs(seconds) >= 1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3f} ms" if abs(seconds) >= 1e-4 or not seconds else f"{seconds * 1e6:.3f} us"


def bytes_text(nbytes: float) -> str:
    """Bytes in powers of 1024."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(nbytes) >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} B"


def signed_seconds(seconds: float) -> str:
    """A difference: "+1.000 ms"."""
    return f"{'-' if seconds < 0 else '+'}{seconds_text(abs(seconds))}"


def signed_bytes(nbytes: float) -> str:
    """A difference: "-1.00 GiB"."""
    return f"{'-' if nbytes < 0 else '+'}{bytes_text(abs(nbytes))}"


def span_text(seconds: float) -> str:
    """A long time in days or hours."""
    for unit, factor in (("days", 86400.0), ("hours", 3600.0)):
        if abs(seconds) >= 2 * factor:
            return f"{seconds / factor:.1f} {unit}"
    return seconds_text(seconds)


def usd_text(usd: float) -> str:
    """US dollars, with cents where there are few."""
    return f"{usd:,.0f} USD" if abs(usd) >= 1000 else f"{usd:.2f} USD"
