"""Seconds and bytes for people."""

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
