"""Seconds of one pass of one part on one rank: kernels, collectives of the tensor axis, and what the host needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.cluster import ClusterSpec, DeviceSpec
from autopar.cost.collectives import MeshAxis, collective_time_s
from autopar.cost.compute import OpClass, op_time_s
from autopar.cost.gemm import gemm_times_s
from autopar.predicting.sizes import Shape
from autopar.predicting.table import Pass


@dataclass(frozen=True)
class Work:
    """Seconds. kernels: the device computes. messages: collectives it waits for. host: to launch it all.

    flops: of one rank.
    """

    kernels_s: float = 0.0
    messages_s: float = 0.0
    host_s: float = 0.0
    flops: float = 0.0

    @property
    def seconds(self) -> float:
        """The device works while the host is ahead of it; where it is not, the host decides."""
        return max(self.kernels_s + self.messages_s, self.host_s)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.kernels_s + other.kernels_s,
            self.messages_s + other.messages_s,
            self.host_s + other.host_s,
            self.flops + other.flops,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.kernels_s * times, self.messages_s * times, self.host_s * times, self.flops * times)


class Pricer:
    """Prices passes on one cluster; every (pass, shape) once.

    host_ops: whether the host launches aten ops one by one (eager), and not kernels (compiled, fused).
    """

    def __init__(self, cluster: ClusterSpec, *, host_op_s: float) -> None:
        self.cluster, self.device, self.host_op_s = cluster, cluster.device, host_op_s
        self._known: dict[tuple[int, Shape], Work] = {}

    def work(self, of: Pass, shape: Shape) -> Work:
        """What one micro-batch of this shape takes."""
        key = (id(of), shape)
        if key not in self._known:
            self._known[key] = self._price(of, shape)
        return self._known[key]

    def _price(self, of: Pass, shape: Shape) -> Work:
        weights = shape.weights
        seconds = flops = 0.0
        products = [k for k in of.kernels if k.dims is not None]
        if products:
            dims = np.maximum(np.stack([k.dims for k in products if k.dims is not None]) @ weights, 1.0)
            for dtype in {k.dtype for k in products}:
                rows = dims[[k.dtype == dtype for k in products]]
                found = gemm_times_s(self.device, rows[:, 1], rows[:, 2], rows[:, 3], rows[:, 0], dtype)
                seconds += float(np.sum(found))
        for kernel in of.kernels:
            work = float(kernel.flops @ weights)
            flops += work
            if kernel.dims is None:
                nbytes = float(kernel.bytes @ weights)
                seconds += _kernel_s(self.device, kernel.kind, work, nbytes, kernel.dtype, kernel.name)
        seconds += len(of.kernels) * self.device.launch_overhead_s
        messages_s = sum(self._message_s(m.kind, float(m.size @ weights), shape) for m in of.messages)
        host_s = (len(of.kernels) + len(of.messages)) * self.host_op_s
        return Work(seconds, messages_s, host_s, flops)

    def _message_s(self, kind: str, nbytes: float, shape: Shape) -> float:
        if shape.tensor == 1 or kind == "regather":
            return 0.0
        axis = MeshAxis(shape.tensor, 1)
        if kind == "sum" and shape.sequence:
            return collective_time_s("reduce_scatter", nbytes, axis, self.cluster)
        if kind == "gather":
            return collective_time_s("all_gather", nbytes, axis, self.cluster) if shape.sequence else 0.0
        return collective_time_s("all_reduce", nbytes, axis, self.cluster)


def _kernel_s(device: DeviceSpec, kind: OpClass, flops: float, nbytes: float, dtype: str, name: str) -> float:
    """Without the launch."""
    return max(0.0, op_time_s(device, kind, flops, nbytes, dtype, name) - device.launch_overhead_s)
