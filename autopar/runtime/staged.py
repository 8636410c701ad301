"""A plan with stages made ready to run: the step of all micro-batches, and its gradients as DTensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autopar.batch_parts import Call, split_call
from autopar.placements import State
from autopar.runtime.binding import bind_inputs
from autopar.runtime.parameters import torch_placements
from autopar.runtime.rank_pipeline import RankPipeline
from autopar.runtime.stage_meshes import StageMeshes, place_on_stage
from autopar.staged import StagedPlan
from autopar.trace import Trace

Weigh = Callable[[Sequence[Mapping[str, torch.Tensor]]], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class CompiledStages:
    """One plan with stages, for one shape of inputs and one mode.

    trace: of one micro-batch. params: how each parameter is stored on the mesh of its stage. weigh: what the loss of
    each micro-batch counts in that of the batch, from their inputs.
    """

    trace: Trace
    plan: StagedPlan
    params: Mapping[str, State]
    pipeline: RankPipeline
    meshes: StageMeshes
    weigh: Weigh

    @property
    def mesh(self) -> object:
        """What the ranks of this program are on; not None."""
        return self.meshes

    def place(self, name: str, source: torch.Tensor) -> torch.Tensor:
        """A parameter where its stage stores it. All ranks call this for all parameters."""
        owner = self.pipeline.program.owners[name] % self.meshes.place.ranks
        return place_on_stage(source, self.params[name], owner, self.meshes)

    def step(
        self, model: nn.Module, call: Call, shared: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, DTensor]]:
        """Loss of the batch, on every rank, and the gradients of the parameters that are stored here.

        shared: local parameters, buffers and constants, by placeholder.
        """
        parts = [bind_inputs(self.trace, model, *one) for one in split_call(model, call, self.pipeline.micro_batches)]
        weights = self.weigh(parts)
        (tangent,) = self.trace.tangents
        batches = [{**part, tangent: weight} for part, weight in zip(parts, weights, strict=True)]
        device = self.plan.cluster.device.kind
        with torch.no_grad(), torch.autocast(device, enabled=False):
            grads = self.pipeline.step(shared, batches)
            assert self.trace.loss is not None
            losses = self.pipeline.results(self.trace.loss, weights[0])
            loss = torch.stack([w * one for w, one in zip(weights, losses, strict=True)]).sum(0)
        return loss, {name: self._as_gradient(name, grad) for name, grad in grads.items()}

    def buffers(self) -> dict[str, torch.Tensor]:
        """New values of buffers, on every rank."""
        metas = {b.fqn: b for b in self.trace.buffers}
        found = {}
        for name, node in self.trace.buffer_updates.items():
            like = torch.empty(metas[name].shape, dtype=metas[name].dtype, device="meta")
            found[name] = self.pipeline.results(node, like)[-1]
        return found

    def _as_gradient(self, name: str, grad: torch.Tensor) -> DTensor:
        placements = torch_placements(self.params[name] or ("R",))
        return DTensor.from_local(grad, self.meshes.mine, placements, run_check=False)
