"""`Job`: one layout of one model on one cluster, with all that its time and memory depend on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autopar.cluster import ClusterSpec
from autopar.cost.collectives import MeshAxis
from autopar.layouts import Layout
from autopar.predicting.precision import Precision
from autopar.predicting.run import Run
from autopar.predicting.sizes import KINDS, Floats, Shape, of_experts
from autopar.predicting.stages import Stage
from autopar.predicting.table import ModelTable
from autopar.predicting.work import Pricer


@dataclass(frozen=True)
class Replicas:
    """Parameters of one rank that the same ranks have: how many numbers, who has them, who shares their state."""

    numbers: float
    axis: MeshAxis
    zero_axis: MeshAxis


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
        """[10]: what a share of each kind counts."""
        return self.shape.weights

    @cached_property
    def data_axis(self) -> MeshAxis:
        """The ranks that share the weights of one stage and tensor rank."""
        return MeshAxis(self.layout.dp * self.layout.cp, self.layout.tp)

    @cached_property
    def zero_axis(self) -> MeshAxis:
        """Those among them that share the optimizer's state."""
        return self._sharing(self.data_axis)

    @cached_property
    def expert_axis(self) -> MeshAxis:
        """The ranks that share the weights of the same experts: one of each group of expert ranks."""
        return MeshAxis(self.data_axis.size // self.layout.ep, self.layout.tp * self.layout.ep)

    def _sharing(self, axis: MeshAxis) -> MeshAxis:
        return MeshAxis(min(self.run.zero_ranks or axis.size, axis.size), axis.stride)

    @cached_property
    def pipeline_axis(self) -> MeshAxis:
        """The stages of one pipeline."""
        return MeshAxis(self.layout.pp, self.layout.tp * self.layout.cp * self.layout.dp)

    def numbers(self, stage: Stage) -> float:
        """Parameters that one rank of the stage computes with; tied ones once where one stage has both uses."""
        return float(self.parameters(stage) @ self.weights)

    def parameters(self, stage: Stage) -> Floats:
        """[10] the same, of all ranks."""
        if stage not in self._parameters:
            self._parameters[stage] = self._summed(stage)
        return self._parameters[stage]

    @cached_property
    def _parameters(self) -> dict[Stage, Floats]:
        return {}

    def _summed(self, stage: Stage) -> Floats:
        made: Floats = np.zeros(KINDS)
        if self.table.own:
            held = {name: size for part, _ in stage.parts(self.table) for name, size in part.numbers.items()}
            return sum(held.values(), made)
        for part, times in stage.parts(self.table):
            made = made + times * part.parameters
        return made - self.table.after.tied if stage.first and stage.last else made

    def held(self, stage: Stage) -> tuple[Replicas, ...]:
        """The parameters of a rank of the stage, by who else has them."""
        if stage not in self._held:
            self._held[stage] = self.replicas(self.parameters(stage))
        return self._held[stage]

    @cached_property
    def _held(self) -> dict[Stage, tuple[Replicas, ...]]:
        return {}

    def replicas(self, parameters: Floats) -> tuple[Replicas, ...]:
        """[10] parameters, by who else has them: those of experts apart where several ranks hold experts."""
        if self.layout.ep == 1:
            return (Replicas(float(parameters @ self.weights), self.data_axis, self.zero_axis),)
        experts = of_experts(parameters)
        return (
            Replicas(float((parameters - experts) @ self.weights), self.data_axis, self.zero_axis),
            Replicas(float(experts @ self.weights), self.expert_axis, self._sharing(self.expert_axis)),
        )

    def owned(self, held: tuple[Replicas, ...]) -> float:
        """Of these, how many numbers a rank keeps the optimizer's state of."""
        return sum(one.numbers / (one.zero_axis.size if self.layout.zero else 1) for one in held)

    def tensors(self, stage: Stage) -> int:
        """Parameters of one rank of the stage, by the piece."""
        return sum(times * part.tensors for part, times in stage.parts(self.table))

    def host_bytes(self, stage: Stage) -> float:
        """What a rank of the stage keeps on its host."""
        if self.layout.offload != "optimizer":
            return 0.0
        return self.owned(self.held(stage)) * self.precision.state

    def streaming_s(self, nbytes: float) -> float:
        """Seconds to read and write that much memory."""
        device = self.cluster.device
        return nbytes / (device.memory_bytes_per_s * device.memory_efficiency_fraction)
