"""`Job`: one layout of one model on one cluster, with all that its time and memory depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from autopar.cluster import ClusterSpec
from autopar.cost.collectives import MeshAxis
from autopar.layouts import Layout
from autopar.predicting.precision import Precision
from autopar.predicting.run import Run
from autopar.predicting.sizes import Floats, Shape
from autopar.predicting.stages import Stage
from autopar.predicting.table import ModelTable
from autopar.predicting.work import Pricer


@dataclass(frozen=True)
class Job:
    """What `step_time` and `stage_memory` read. micro_batches: of a step on each data-parallel rank."""

    table: ModelTable
    layout: Layout
    cluster: ClusterSpec
    pricer: Pricer
    shape: Shape
    micro_batches: int
    precision: Precision
    run: Run

    @cached_property
    def weights(self) -> Floats:
        """[5]: what a share of each kind counts."""
        return self.shape.weights

    @property
    def data_axis(self) -> MeshAxis:
        """The ranks that share the weights of one stage and tensor rank."""
        return MeshAxis(self.layout.dp * self.layout.cp, self.layout.tp)

    @property
    def zero_axis(self) -> MeshAxis:
        """Those among them that share the optimizer's state."""
        return MeshAxis(min(self.run.zero_ranks or self.data_axis.size, self.data_axis.size), self.layout.tp)

    @property
    def pipeline_axis(self) -> MeshAxis:
        """The stages of one pipeline."""
        return MeshAxis(self.layout.pp, self.layout.tp * self.layout.cp * self.layout.dp)

    def numbers(self, stage: Stage) -> float:
        """Parameters that one rank of the stage computes with; tied ones once where one stage has both uses."""
        weights = self.weights
        numbers = sum(times * float(part.parameters @ weights) for part, times in stage.parts(self.table))
        if stage.first and stage.last:
            numbers -= float(self.table.after.tied @ weights)
        return numbers

    def tensors(self, stage: Stage) -> int:
        """Parameters of one rank of the stage, by the piece."""
        return sum(times * part.tensors for part, times in stage.parts(self.table))

    def host_bytes(self, numbers: float) -> float:
        """What a rank with so many parameters keeps on its host."""
        if self.layout.offload != "optimizer":
            return 0.0
        return numbers * self.precision.state / (self.zero_axis.size if self.layout.zero >= 1 else 1)

    def streaming_s(self, nbytes: float) -> float:
        """Seconds to read and write that much memory."""
        device = self.cluster.device
        return nbytes / (device.memory_bytes_per_s * device.memory_efficiency_fraction)
