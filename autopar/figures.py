"""The predicted figures of a plan: time and its parts, memory and its parts, rates."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from autopar.cost.model import CostModel
from autopar.dataflow import Dataflow, is_real_op
from autopar.memory_types import MemoryEstimate
from autopar.opcost import compute_dtype, op_flops_of
from autopar.pricing import Price
from autopar.trace import Trace


def predicted_figures(
    trace: Trace, price: Price, memory: MemoryEstimate, costs: CostModel, limit_bytes: int
) -> dict[str, Any]:
    """Figures of one training step. Keys end in their unit; `mfu` and `hfu` are shares of the peak rate.

    MFU counts the model's FLOPs once; HFU adds recomputation and work done on several ranks.
    """
    step = price.step_time_s
    devices = costs.cluster.devices
    flops, peak = model_flops(trace), _peak_rate(trace, costs)
    return {
        "step_time_s": step,
        "tokens_per_s_per_gpu": tokens(trace) / step / devices if step else 0.0,
        "mfu": flops / devices / step / peak if step else 0.0,
        "hfu": (price.flops + price.recomputed_flops) / step / peak if step else 0.0,
        "peak_bytes": memory.peak_bytes,
        "fits": memory.peak_bytes <= limit_bytes,
        "breakdown": {
            "forward_s": price.forward_s,
            "backward_s": price.backward_s,
            "recompute_s": price.recompute_s,
            "optimizer_s": price.optimizer_s,
            "communication_s": price.communication_s,
            "communication_by_kind_s": communication_by_kind(price),
            **({"offload_s": price.offload_s, "host_bytes": price.host_bytes} if price.offloads else {}),
            "memory_bytes": dict(memory.categories),
            "peak_at": f"{memory.phase}: {memory.node}",
        },
    }


def tokens(trace: Trace) -> int:
    """Tokens of one global batch: batch x sequence for integer inputs, else samples."""
    for info in trace.inputs:
        if info.batch_dim == 0:
            ids = len(info.shape) > 1 and not info.dtype.is_floating_point
            return int(info.shape[0] * info.shape[1]) if ids else int(info.shape[0])
    return 1


def model_flops(trace: Trace) -> int:
    """FLOPs of one forward and backward pass of the whole model."""
    return sum(op_flops_of(n) for n in trace.graph_module.graph.nodes if is_real_op(n))


def communication_by_kind(price: Price) -> dict[str, float]:
    """Seconds by kind of collective and mesh axis, e.g. {"all_gather on axis 0": ...}."""
    seconds: dict[str, float] = defaultdict(float)
    for transfer in price.transfers:
        for kind, axis, _, step_s in transfer.steps:
            seconds[f"{kind} on axis {axis}"] += step_s
    return dict(sorted(seconds.items()))


def _peak_rate(trace: Trace, costs: CostModel) -> float:
    """The device's peak FLOP/s in the dtype in which most of the model's FLOPs are done."""
    by_dtype: dict[str, int] = defaultdict(int)
    flow = Dataflow.of(trace)
    for node in flow.ops:
        by_dtype[compute_dtype(node, flow.operands_of[node])] += op_flops_of(node)
    dtype = max(by_dtype, key=lambda d: by_dtype[d], default="float32")
    return costs.device.peak_flops(dtype)
