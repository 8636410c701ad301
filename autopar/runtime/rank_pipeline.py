"""The part of a pipeline that one rank runs: its stages, their schedule, and what stages do for each other at both ends
of a step (a tied parameter on its way to the stages that use it, its gradients on their way back, the loss to all)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from autopar.codegen.stage_types import PipelineProgram, StageProgram
from autopar.errors import PlanError
from autopar.runtime.schedule import Schedule
from autopar.runtime.stage import Stage, StepValues
from autopar.simulating.schedules import Order


@dataclass(frozen=True)
class Place:
    """Where a rank is: its coordinates in the pipeline and in the mesh of its stage, and the groups that it is in.

    pipeline: the ranks of the same coordinates in all stages, first to last. axes: group names of the stage's mesh.
    """

    pipeline: dist.ProcessGroup
    axes: tuple[str, ...]
    coordinates: tuple[int, ...]
    device: torch.device

    @property
    def rank(self) -> int:
        """This rank's number in the pipeline."""
        return dist.get_rank(self.pipeline)

    @property
    def ranks(self) -> int:
        """How many ranks the pipeline has."""
        return dist.get_world_size(self.pipeline)


@dataclass(frozen=True)
class Tied:
    """A parameter that several ranks of a pipeline take.

    node: its placeholder. like: of its local shape and dtype as it is stored. owner, users: pipeline ranks. summed:
    those of the users whose gradient the owner adds.
    """

    name: str
    node: str
    like: torch.Tensor
    owner: int
    users: tuple[int, ...]
    summed: tuple[int, ...]


class RankPipeline:
    """A `PipelineProgram` on one rank.

    orders: what each pipeline rank runs (`schedule_orders`). placeholders: of the parameters, by name. sum_dtype: of
    sums of gradients, see `Stage`.
    """

    def __init__(
        self,
        program: PipelineProgram,
        orders: Sequence[Order],
        placeholders: Mapping[str, str],
        place: Place,
        sum_dtype: torch.dtype | None = None,
    ) -> None:
        self.program, self.place, self.sum_dtype = program, place, sum_dtype
        self.micro_batches = 1 + max(action.micro_batch for action in orders[0])
        self.stages = [
            Stage(one, len(program.stages), place.pipeline, place.axes, place.coordinates, place.device, sum_dtype)
            for one in self.stages_of(place.rank)
        ]
        self.schedule = Schedule(self.stages, orders, self.micro_batches)
        self.tied = tied_parameters(program, placeholders, place.ranks)

    def owner(self, name: str) -> int:
        """The pipeline rank that stores a parameter."""
        return self.program.owners[name] % self.place.ranks

    def owns(self, name: str) -> bool:
        """Whether this rank stores a parameter."""
        return self.owner(name) == self.place.rank

    def stages_of(self, rank: int) -> tuple[StageProgram, ...]:
        """The stages that a pipeline rank runs."""
        return self.program.stages[rank :: self.place.ranks]

    def step(
        self, shared: Mapping[str, torch.Tensor], batches: Sequence[Mapping[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Run a step; the gradients of the parameters that this rank owns, local and as they are stored.

        shared: local tensors of these parameters, and buffers and constants, by placeholder. batches: inputs and
        tangents of each micro-batch. What the passes returned is in `results`.
        """
        values = StepValues({**shared, **self._lend(shared)}, batches)
        for stage in self.stages:
            stage.begin(values)
        self.schedule.run()
        summed: dict[str, torch.Tensor] = {}
        for stage in self.stages:
            for name, grad in stage.finish().items():
                summed[name] = summed[name] + grad if name in summed else grad
        return self._collect(summed)

    def evaluate(self, shared: Mapping[str, torch.Tensor], batches: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Run the forward passes of a step; arguments as of `step`. What they returned is in `results`."""
        values = StepValues({**shared, **self._lend(shared)}, batches)
        for stage in self.stages:
            stage.begin(values, backward_follows=False)
        self.schedule.run_forward()
        for stage in self.stages:
            stage.end()

    def results(self, output: str, like: torch.Tensor) -> list[torch.Tensor]:
        """An output of every micro-batch (a loss, a buffer's new value), on all ranks of the pipeline.

        like: of its shape and dtype, whatever it holds.
        """
        stage = next(s for s in self.program.stages if output in s.outputs)
        source = stage.index % self.place.ranks
        found = torch.empty((self.micro_batches, *like.shape), dtype=like.dtype, device=self.place.device)
        for mine in self.stages:
            if mine.program is stage:
                position = stage.outputs.index(output)
                found = torch.stack([one[position].detach() for one in mine.outputs])
        dist.broadcast(found, group=self.place.pipeline, group_src=source)
        return list(found)

    def _lend(self, shared: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values of tied parameters, from their owners to all who use them."""
        rank, borrowed = self.place.rank, {}
        sends: list[dist.Work | None] = []
        for one in self.tied:
            if rank == one.owner:
                mine = shared[one.node].detach().contiguous()
                sends += [dist.isend(mine, group=self.place.pipeline, group_dst=user) for user in one.users]
            elif rank in one.users:
                borrowed[one.node] = self._empty(one.like)
                dist.recv(borrowed[one.node], group=self.place.pipeline, group_src=one.owner)
        _wait(sends)
        return borrowed

    def _collect(self, summed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of tied parameters, from all who use them to their owners."""
        rank = self.place.rank
        sends: list[dist.Work | None] = []
        for one in self.tied:
            if rank in one.summed:
                mine = summed.pop(one.name).contiguous()
                sends.append(dist.isend(mine, group=self.place.pipeline, group_dst=one.owner))
            elif rank == one.owner:
                for user in one.summed:
                    theirs = self._empty(one.like)
                    dist.recv(theirs, group=self.place.pipeline, group_src=user)
                    summed[one.name] = summed[one.name] + theirs if one.name in summed else theirs
        _wait(sends)
        return summed

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(tuple(like.shape), dtype=like.dtype, device=self.place.device)


def _wait(sends: Sequence[dist.Work | None]) -> None:
    for send in sends:
        if send is not None:
            send.wait()


def tied_parameters(program: PipelineProgram, placeholders: Mapping[str, str], ranks: int) -> tuple[Tied, ...]:
    """The parameters that more than one rank of a pipeline takes."""
    found = []
    for name, stage in program.owners.items():
        owner = stage % ranks
        users = {s.index % ranks for s in program.stages if name in s.params} - {owner}
        summed = {s.index % ranks for s in program.stages if name in (*s.grads_early, *s.grads_late)} - {owner}
        if users:
            like = _stored(program.stages[stage], placeholders[name])
            found.append(Tied(name, placeholders[name], like, owner, tuple(sorted(users)), tuple(sorted(summed))))
    return tuple(found)


def _stored(stage: StageProgram, node: str) -> torch.Tensor:
    """A parameter as the passes of a stage take it: fake, of its local shape."""
    for one in (stage.forward, stage.backward, stage.weights):
        inputs = [n for n in one.graph.nodes if n.op == "placeholder"][len(stage.mesh) :]
        for version, placeholder in zip(one.inputs, inputs, strict=True):
            if version[0] == node:
                found: torch.Tensor = placeholder.meta["val"]
                return found
    raise PlanError(f"stage {stage.index} owns {node} and does not take it")
