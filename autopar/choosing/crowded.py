"""Whether a step's samples have room all at once: where they have not, micro-batches may be faster than anything else.

A plan op by op runs the whole batch at once. What the backward pass reads then has to be kept, made again, or fetched
back; micro-batches hold a part of it at a time, at the price of smaller products. So they are worth a look where the
tensors that are kept, spread evenly over all devices, do not fit.
"""

from __future__ import annotations

from autopar.cluster import ClusterSpec
from autopar.dataflow import Dataflow, is_backward
from autopar.trace import Trace


def kept_bytes(trace: Trace) -> int:
    """Of all results of the forward pass that the backward pass reads, for the whole batch."""
    flow = Dataflow.of(trace)
    forward = {op for op in flow.ops if not is_backward(op)}
    kept = {
        operand.value: operand.base_tensor
        for op in flow.ops
        if op not in forward
        for operand in flow.operands_of[op]
        if operand.node in forward
    }
    return sum(tensor.numel() * tensor.itemsize for tensor in kept.values())


def crowded(trace: Trace, cluster: ClusterSpec, limit_bytes: int) -> bool:
    """Whether no device could hold its even share."""
    return kept_bytes(trace) > limit_bytes * cluster.devices
