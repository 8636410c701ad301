"""A plan with stages made ready to run: the step of all micro-batches, and its gradients as DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autopar._torch_compat import dtensor_maker
from autopar.batch_parts import Call, split_leaves
from autopar.drawing import random_nodes
from autopar.loss_weights import LossWeights
from autopar.placements import State
from autopar.runtime.binding import bind_leaves
from autopar.runtime.parameters import torch_placements
from autopar.runtime.rank_pipeline import RankPipeline
from autopar.runtime.stage_meshes import StageMeshes, place_on_stage
from autopar.staged import StagedPlan
from autopar.trace import Trace, input_leaves


@dataclass(frozen=True)
class CompiledStages:
    """One plan with stages, for one shape of inputs and one mode.

    trace: of one micro-batch. params: how each parameter is stored on the mesh of its stage. loss: how
    those of the micro-batches make that of the batch. makers: of gradients, by
    name and layout.
    """

    trace: Trace
    plan: StagedPlan
    params: Mapping[str, State]
    pipeline: RankPipeline
    meshes: StageMeshes
    loss: LossWeights
    makers: dict[object, Callable[[torch.Tensor], DTensor]] = field(default_factory=dict)

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
        weights, batches = self._micro_batches(model, call, shared)
        with self._running():
            grads = self.pipeline.step(shared, batches)
            loss = self._loss(weights)
        return loss, {name: self._as_gradient(name, grad) for name, grad in grads.items()}

    def evaluate(self, model: nn.Module, call: Call, shared: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Loss of the batch, on every rank; no gradients. Arguments as of `step`."""
        weights, batches = self._micro_batches(model, call, shared)
        with self._running():
            self.pipeline.evaluate(shared, batches)
            return self._loss(weights)

    def _micro_batches(
        self, model: nn.Module, call: Call, shared: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        """How much each micro-batch's loss counts, and what it brings."""
        leaves = split_leaves(input_leaves(model.forward, *call), self.pipeline.micro_batches)
        parts = [bind_leaves(self.trace, one) for one in leaves]
        tangent, like = self._tangent
        weights = [
            torch.full(like.shape, weight, dtype=like.dtype, device=self.meshes.place.device)
            for weight in self.loss.of([{**shared, **part} for part in parts])
        ]
        return weights, [{**part, tangent: weight} for part, weight in zip(parts, weights, strict=True)]

    @cached_property
    def _tangent(self) -> tuple[str, torch.Tensor]:
        """The placeholder of the loss's gradient, and what it is like."""
        (tangent,) = self.trace.tangents
        return tangent, next(n.meta["val"] for n in self.trace.graph_module.graph.nodes if n.name == tangent)

    def _loss(self, weights: list[torch.Tensor]) -> torch.Tensor:
        assert self.trace.loss is not None
        losses = self.pipeline.results(self.trace.loss, weights[0])
        return torch.stack([w * one for w, one in zip(weights, losses, strict=True)]).sum(0)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """While passes run."""
        device = self.plan.cluster.device.kind
        with torch.no_grad(), torch.autocast(device, enabled=False), self._own_numbers():
            yield

    @cached_property
    def _draws(self) -> bool:
        """Whether the model draws random numbers: asked every step, and every op has to be looked at."""
        return bool(random_nodes(self.trace))

    @contextmanager
    def _own_numbers(self) -> Iterator[None]:
        """Random numbers of this stage. Stages draw unequally much, and the generators of all ranks must not part."""
        if not self._draws:
            yield
            return
        seed = int(torch.randint(2**62, ()))
        with torch.random.fork_rng():
            torch.manual_seed(seed + self.meshes.place.rank)
            yield

    def buffers(self) -> dict[str, torch.Tensor]:
        """New values of buffers, on every rank."""
        metas = {b.fqn: b for b in self.trace.buffers}
        found = {}
        for name, node in self.trace.buffer_updates.items():
            like = torch.empty(metas[name].shape, dtype=metas[name].dtype, device="meta")
            found[name] = self.pipeline.results(node, like)[-1]
        return found

    def _as_gradient(self, name: str, grad: torch.Tensor) -> DTensor:
        layout = (name, grad.shape, grad.stride(), grad.dtype)
        make = self.makers.get(layout)
        if make is not None:
            return make(grad)
        placements = torch_placements(self.params[name] or ("R",))
        made = DTensor.from_local(grad, self.meshes.mine, placements, run_check=False)
        self.makers[layout] = dtensor_maker(made)
        return made
