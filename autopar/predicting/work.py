"""Seconds of one pass of one part on one rank: kernels, collectives inside it, and what the host needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.cluster import ClusterSpec, DeviceSpec
from autopar.cost.collectives import MeshAxis, collective_time_s
from autopar.cost.compute import OpClass, op_time_s
from autopar.cost.gemm import gemm_times_s
from autopar.cost.host import OpCounts, host_time_s
from autopar.predicting.run import Run
from autopar.predicting.sizes import KINDS, Floats, Shape
from autopar.predicting.table import Pass

# What a collective inside a pass costs the host, in ops of the forward pass: the framework's autograd function,
# the buffer, contiguity, the stream's events, the work object, the wait, and Python around all of them. From the floor
# of 4.4 ms a layer and micro-batch that eager tensor parallelism shows at any degree on one node of H100.
_COLLECTIVE_OPS = 28
_AT_ONCE = 64  # shapes: their tables of tiles stay in a processor's cache


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds. kernels: the device computes. messages: collectives it waits for. host: to launch it all.

    flops: of one rank. context_s, expert_s: of the messages, those on the context axis and between experts; the others
    are on the tensor axis.
    """

    kernels_s: float = 0.0
    messages_s: float = 0.0
    host_s: float = 0.0
    flops: float = 0.0
    context_s: float = 0.0
    expert_s: float = 0.0

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
            self.context_s + other.context_s,
            self.expert_s + other.expert_s,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            self.kernels_s * times,
            self.messages_s * times,
            self.host_s * times,
            self.flops * times,
            self.context_s * times,
            self.expert_s * times,
        )


@dataclass(frozen=True)
class _Arrays:
    """The sizes of a pass, stacked. flops, bytes: [kernels, 5]. dims: [products, 4, 5]. products: rows by dtype."""

    flops: Floats
    bytes: Floats
    dims: Floats
    products: dict[str, list[int]]

    @staticmethod
    def of(one: Pass) -> _Arrays:
        found = [(k.dtype, k.dims) for k in one.kernels if k.dims is not None]
        products: dict[str, list[int]] = {}
        for row, (dtype, _) in enumerate(found):
            products.setdefault(dtype, []).append(row)
        return _Arrays(
            flops=np.array([k.flops for k in one.kernels]).reshape(-1, KINDS),
            bytes=np.array([k.bytes for k in one.kernels]).reshape(-1, KINDS),
            dims=np.array([dims for _, dims in found]).reshape(-1, 4, KINDS),
            products=products,
        )


class Pricer:
    """Prices passes on one cluster; every (pass, shape) once."""

    def __init__(self, cluster: ClusterSpec, run: Run) -> None:
        self.cluster, self.device, self.run = cluster, cluster.device, run
        self._known: dict[tuple[int, Shape], Work] = {}
        self._products_s: dict[tuple[int, bytes], float] = {}  # by sizes, which several shapes may have
        self._stacked: dict[int, _Arrays] = {}

    def work(self, of: Pass, shape: Shape) -> Work:
        """What one micro-batch of this shape takes."""
        key = (id(of), shape)
        if key not in self._known:
            self._known[key] = self._price(of, shape)
        return self._known[key]

    def prepare(self, of: Pass, shapes: Sequence[Shape]) -> None:
        """Price the matrix products of many shapes at once, which takes a fraction of what one by one does."""
        arrays, unknown = self._arrays(of), {shape.weights.tobytes(): shape.weights for shape in shapes}
        keys = list(unknown)
        for begin in range(0, len(keys), _AT_ONCE):
            some = keys[begin : begin + _AT_ONCE]
            dims = np.stack([np.maximum(arrays.dims @ unknown[key], 1.0) for key in some])  # [shapes, products, 4]
            seconds: Floats = np.zeros(len(some))
            for dtype, rows in arrays.products.items():
                batch, m, n, k = np.moveaxis(dims[:, rows], 2, 0)
                seconds = seconds + gemm_times_s(self.device, m, n, k, batch, dtype).sum(axis=1)
            self._products_s.update(((id(of), key), s) for key, s in zip(some, seconds.tolist(), strict=True))

    def _price(self, of: Pass, shape: Shape) -> Work:
        arrays, weights = self._arrays(of), shape.weights
        works, moved = arrays.flops @ weights, arrays.bytes @ weights
        if (id(of), weights.tobytes()) not in self._products_s:
            self.prepare(of, [shape])
        seconds, attention_s = self._products_s[id(of), weights.tobytes()], 0.0
        for kernel, work, nbytes in zip(of.kernels, works.tolist(), moved.tolist(), strict=True):
            if kernel.dims is None:
                kernel_s = _kernel_s(self.device, kernel.kind, work, nbytes, kernel.dtype, kernel.name)
                if kernel.kind is OpClass.ATTENTION:
                    kernel_s *= self.run.attention_factor
                    attention_s += kernel_s
                seconds += kernel_s
        seconds = seconds / self.device.step_fraction + len(of.kernels) * self.device.kernel_gap_s
        tensor = [m for m in of.messages if m.kind != "exchange"]
        exchanged = [float(m.size @ weights) for m in of.messages if m.kind == "exchange"]
        messages_s = sum(self._message_s(m.kind, float(m.size @ weights), shape) for m in tensor)
        expert_s = sum(self._exchange_s(nbytes, shape) for nbytes in exchanged)
        messages = len(tensor) if shape.tensor > 1 else 0
        far_s = self.run.far_tensor_s * shape.tensor if shape.tensor > self.cluster.devices_per_node else 0.0
        stall_s = self.run.pipeline_stall_s * shape.tensor + far_s if shape.far_pipeline else 0.0
        host_s = self._host_s(of, messages + (len(exchanged) if shape.expert > 1 else 0)) + messages * stall_s
        messages_s += messages * far_s + expert_s
        shown_s = max(0.0, self._ring_s(of, shape) - attention_s / self.device.step_fraction)
        shown_s *= (shape.context - 1) / shape.context
        return Work(seconds, messages_s + shown_s, host_s, float(works.sum()), shown_s, expert_s)

    def _arrays(self, of: Pass) -> _Arrays:
        if id(of) not in self._stacked:
            self._stacked[id(of)] = _Arrays.of(of)
        return self._stacked[id(of)]

    def _ring_s(self, of: Pass, shape: Shape) -> float:
        """Seconds for keys and values to go around the context axis once, as in ring attention (Liu et al. 2023).

        Backward, their gradients go around with them.
        """
        nbytes = float(of.shown @ shape.weights) * (2 if of.backward else 1)
        if shape.context == 1 or not nbytes:
            return 0.0
        axis = MeshAxis(shape.context, shape.tensor)
        return shape.context * collective_time_s("permute", nbytes, axis, self._fitting(shape.tensor * shape.context))

    def _host_s(self, of: Pass, messages: int) -> float:
        """What it takes to launch it all."""
        kernels = len(of.kernels)
        if not self.run.eager:
            return host_time_s(self.device, OpCounts(forward=kernels + messages), "compiled")
        python = messages * _COLLECTIVE_OPS
        if of.backward:
            return host_time_s(self.device, OpCounts(forward=python, backward=kernels))
        return host_time_s(self.device, OpCounts(forward=kernels + python, views=of.views))

    def _message_s(self, kind: str, nbytes: float, shape: Shape) -> float:
        if shape.tensor == 1 or kind == "regather":
            return 0.0  # what is gathered again comes while other products run
        if kind == "gather" and not shape.sequence:
            return 0.0
        done = {"gather": "all_gather", "sum": "reduce_scatter" if shape.sequence else "all_reduce"}
        return collective_time_s(
            done.get(kind, "all_reduce"), nbytes, MeshAxis(shape.tensor, 1), self._fitting(shape.tensor)
        )

    def _exchange_s(self, nbytes: float, shape: Shape) -> float:
        """Rows of so many bytes, from a rank's tokens to those that hold their experts, or back."""
        axis = MeshAxis(shape.expert, shape.tensor)
        return collective_time_s("all_to_all", nbytes, axis, self._fitting(shape.tensor * shape.expert))

    def _fitting(self, group: int) -> ClusterSpec:
        """The cluster, or as many of its nodes as can be filled with groups of so many ranks."""
        devices = self.cluster.devices
        if devices % group == 0:
            return self.cluster
        filled = devices - devices % math.lcm(group, self.cluster.devices_per_node)
        return self.cluster.part(filled or group)  # or a part of one node


def _kernel_s(device: DeviceSpec, kind: OpClass, flops: float, nbytes: float, dtype: str, name: str) -> float:
    """Without the launch."""
    return max(0.0, op_time_s(device, kind, flops, nbytes, dtype, name) - device.launch_overhead_s)
