"""The precisions that a plan may compute in.

"model"  every op in the dtype it has in the model, parameters in theirs
"fp32"   the same, for a model that is float32
"bf16"   as under `torch.autocast(dtype=torch.bfloat16)`: parameters, their gradients, the optimizer's state and what
         autocast leaves alone (norms, softmax, losses) in float32, products in bfloat16

Gradients of float32 parameters are summed over ranks in float32 whatever they were computed in
(`autopar.dataflow.narrow_gradients`).
"""

from __future__ import annotations

import torch
from torch import nn

from autopar.errors import AutoparError, TraceError

MODEL = "model"
PRECISIONS = (MODEL, "fp32", "bf16")


def checked_precision(precision: str | None) -> str:
    """A precision by name, "model" for None; raises AutoparError for a name that is none."""
    if precision is None:
        return MODEL
    if precision not in PRECISIONS:
        raise AutoparError(f"precision={precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    return precision


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The dtype that products are computed in, None for that of their operands."""
    return torch.bfloat16 if precision == "bf16" else None


def parameter_dtype(precision: str) -> torch.dtype | None:
    """The dtype that parameters must have, None for any."""
    return None if precision == MODEL else torch.float32


def check_parameters(model: nn.Module, precision: str) -> None:
    """Raise TraceError where a parameter hasn't the dtype that a precision wants."""
    wanted = parameter_dtype(precision)
    for name, param in model.named_parameters() if wanted else ():
        if param.is_floating_point() and param.dtype != wanted:
            found = str(param.dtype).removeprefix("torch.")
            raise TraceError(
                f"precision={precision!r} wants float32 parameters, but {name} is {found}; call model.float() first, "
                "or leave precision out"
            )
