"""The cost model that the solver, the simulator and the report share: a cluster seen as one mesh."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from autopar.cluster import ClusterSpec, DeviceSpec
from autopar.cost.collectives import MeshAxis, collective_time_s, mesh_axes
from autopar.cost.compute import OpClass, op_time_s
from autopar.cost.optimizer import optimizer_time_s
from autopar.errors import ClusterSpecError

# Gradients that are reduced together. On GPUs: the default of torch's DistributedDataParallel. On CPUs every message
# wakes a thread of gloo's on a core that computes: with this size BERT of benchmarks/workloads.py, data parallel on 2
# ranks of one core each (2026-11-25), trains 0.9 % faster than with 4 MiB, which have three times the messages.
_BUCKET_BYTES = {"cpu": 12 << 20}
_DEFAULT_BUCKET_BYTES = 25 << 20
# Of a gradient reduction's seconds, those that the backward pass does not hide. On CPU: Llama and BERT of
# benchmarks/workloads.py, data parallel on 2 ranks, waited 20 of 40 ms. Elsewhere nothing is counted on.
_EXPOSED_GRADIENT_SHARE = {"cpu": 0.5}


@dataclass(frozen=True)
class CostModel:
    """Seconds of everything a rank does, on a row-major mesh over all devices of a cluster. Pure."""

    cluster: ClusterSpec
    mesh: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mesh", tuple(self.mesh))
        mesh_axes(self.cluster, self.mesh)  # refuses a mesh that does not fit

    @cached_property
    def axes(self) -> tuple[MeshAxis, ...]:
        """The axes of the mesh."""
        return mesh_axes(self.cluster, self.mesh)

    @property
    def device(self) -> DeviceSpec:
        """The device each rank has."""
        return self.cluster.device

    @property
    def bucket_bytes(self) -> int:
        """Gradients are reduced together up to so many bytes."""
        return _BUCKET_BYTES.get(self.device.kind, _DEFAULT_BUCKET_BYTES)

    @property
    def exposed_gradient_share(self) -> float:
        """Of the seconds of a gradient reduction, the share that is not hidden by the rest of the backward pass."""
        return _EXPOSED_GRADIENT_SHARE.get(self.device.kind, 1.0)

    @property
    def scatters_by_exchange(self) -> bool:
        """Whether a reduce-scatter is emitted as an exchange of blocks and their sum (see `GraphBuilder`)."""
        return self.device.kind == "cpu"

    def op_s(self, kind: OpClass, flops: float, bytes_moved: float, dtype: str, name: str = "") -> float:
        """Seconds of one op on a rank's local tensors; bytes read and written; name: the op's own, such as "gelu"."""
        return op_time_s(self.device, kind, flops, bytes_moved, dtype, name)

    def views_s(self, count: int) -> float:
        """Seconds of making `count` views."""
        return count * self.device.view_overhead_s

    def collective_s(self, kind: str, nbytes: float, axis: int) -> float:
        """Seconds of a collective on mesh axis `axis`; nbytes as in `autopar.cost.collectives`."""
        size = self.axes[axis].size
        if kind == "reduce_scatter" and self.scatters_by_exchange and size > 1:
            exchange_s = collective_time_s("all_to_all", nbytes, self.axes[axis], self.cluster)
            return exchange_s + self.op_s(OpClass.ELEMENTWISE, 0.0, nbytes * (1 + 1 / size), "float32", "sum")
        return collective_time_s(kind, nbytes, self.axes[axis], self.cluster)

    def shown_s(self, messages_s: float, compute_s: float) -> float:
        """Seconds of messages that go on while the device computes for `compute_s`: what is left when that is over.

        A CPU that computes moves messages with the same cores, so nothing is hidden there.
        """
        return messages_s if self.device.kind == "cpu" else max(0.0, messages_s - compute_s)

    def copy_s(self, nbytes: float) -> float:
        """Seconds to copy `nbytes` locally: read and written once, launch included; 0 without bytes."""
        if nbytes == 0:
            return 0.0
        return op_time_s(self.device, OpClass.ELEMENTWISE, 0.0, 2 * nbytes, "float32", "clone")

    @property
    def host_bytes(self) -> int | None:
        """A rank's share of the memory of its host, for what is offloaded; None where no link to a host is known."""
        share = self.cluster.host_memory_bytes // self.cluster.devices_per_node
        return share if self.device.host_link_bytes_per_s else None

    def offload_s(self, nbytes: float) -> float:
        """Seconds to copy `nbytes` to the host and, later, back: nothing else runs meanwhile."""
        if not self.device.host_link_bytes_per_s:
            raise ClusterSpecError(
                f"device.host_link_bytes_per_s of {self.cluster.name!r} is 0, so nothing can be offloaded there; "
                "describe the link, or plan without offload"
            )
        return 2 * (self.device.launch_overhead_s + nbytes / self.device.host_link_bytes_per_s)

    def optimizer_s(self, param_bytes: float, state_bytes: float) -> float:
        """Seconds of the optimizer's step on a rank's share of one parameter and its state."""
        return optimizer_time_s(self.device, param_bytes, state_bytes)
