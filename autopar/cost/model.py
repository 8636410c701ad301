"""The cost model that the solver, the simulator and the report share: a cluster seen as one mesh."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from autopar.cluster import ClusterSpec, DeviceSpec
from autopar.cost.collectives import MeshAxis, collective_time_s, mesh_axes
from autopar.cost.compute import OpClass, op_time_s
from autopar.cost.optimizer import optimizer_time_s


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

    def op_s(self, kind: OpClass, flops: float, bytes_moved: float, dtype: str, name: str = "") -> float:
        """Seconds of one op on a rank's local tensors; bytes read and written; name: the op's own, such as "gelu"."""
        return op_time_s(self.device, kind, flops, bytes_moved, dtype, name)

    def views_s(self, count: int) -> float:
        """Seconds of making `count` views."""
        return count * self.device.view_overhead_s

    def collective_s(self, kind: str, nbytes: float, axis: int) -> float:
        """Seconds of a collective on mesh axis `axis`; nbytes as in `autopar.cost.collectives`."""
        return collective_time_s(kind, nbytes, self.axes[axis], self.cluster)

    def copy_s(self, nbytes: float) -> float:
        """Seconds to copy `nbytes` locally: read and written once, launch included; 0 without bytes."""
        if nbytes == 0:
            return 0.0
        return op_time_s(self.device, OpClass.ELEMENTWISE, 0.0, 2 * nbytes, "float32", "clone")

    def optimizer_s(self, param_bytes: float, state_bytes: float) -> float:
        """Seconds of the optimizer's step on a rank's share of one parameter and its state."""
        return optimizer_time_s(self.device, param_bytes, state_bytes)
