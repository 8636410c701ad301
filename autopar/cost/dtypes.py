"""Bytes of a number by the name of its dtype."""

from __future__ import annotations

from autopar.errors import AutoparError

FLOATING = {
    "float64": 8,
    "float32": 4,
    "tf32": 4,
    "bfloat16": 2,
    "float16": 2,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
ITEMSIZE = {**FLOATING, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}


def itemsize(dtype: str) -> int:
    """Bytes of one number of a dtype, as in "bfloat16"; AutoparError for a name that is none."""
    if dtype not in ITEMSIZE:
        raise AutoparError(f"unknown dtype {dtype!r}; use one of {', '.join(ITEMSIZE)}")
    return ITEMSIZE[dtype]
