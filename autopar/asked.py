"""What a caller asks for, checked: options of `compile` and `plan`, and example inputs where none were given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from autopar.cluster import ClusterSpec
from autopar.errors import AutoparError, PlanMismatch
from autopar.models import example_inputs as default_inputs
from autopar.plans import PlanOptions
from autopar.precision import checked_precision
from autopar.trace import Trace

Call = tuple[tuple[Any, ...], dict[str, Any]]


def plan_options(
    traced: Trace,
    cluster: ClusterSpec,
    global_batch: int | None,
    precision: str,
    optimizer: str,
    memory_limit_bytes: int | None,
    pin: Mapping[str, Any] | None,
) -> PlanOptions:
    batch = next((i.shape[0] for i in traced.inputs if i.batch_dim == 0), 1)
    if global_batch is not None and global_batch != batch:
        raise PlanMismatch(f"global_batch={global_batch}, but the example inputs hold a batch of {batch}")
    if memory_limit_bytes is not None and memory_limit_bytes <= 0:
        raise AutoparError(f"memory_limit_bytes must be positive, got {memory_limit_bytes}")
    limit = memory_limit_bytes or cluster.device.memory_bytes - cluster.device.reserved_bytes
    pins = {k: list(v) if isinstance(v, tuple) else v for k, v in (pin or {}).items()}
    return PlanOptions(batch, precision, optimizer, limit, pins)


def default_call(model: nn.Module, global_batch: int | None, seq: int | None) -> Call:
    if global_batch is None:
        raise AutoparError("pass example_inputs=(args, kwargs), or global_batch= and seq= for a transformers model")
    return default_inputs(model, global_batch, seq)


def check_options(precision: str | None, objective: str) -> str:
    """The precision by name; raises AutoparError for what is unknown."""
    precision = checked_precision(precision)
    if objective != "throughput":
        raise AutoparError(f"objective={objective!r} is not available yet; use 'throughput'")
    return precision
