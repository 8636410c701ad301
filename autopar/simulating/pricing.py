"""What the passes of a layout take, piece by piece: the prices of `autopar.predicting`, before anything is added up.

What the closed form adds up by rules of thumb (what a pipeline's fill costs, how much of a message hides behind what)
is left to the engine; the seconds of every kernel and message are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from autopar.layouts import Layout
from autopar.predicting.job import Job
from autopar.predicting.memory import StageMemory, in_flight
from autopar.predicting.pauses import pause_s
from autopar.predicting.predict import Predictor
from autopar.predicting.reductions import messages, reduction, returned, rounds, tied_s
from autopar.predicting.sizes import Floats
from autopar.predicting.stages import Stage, again_work, blocks_held, kept_of, per_chunk, run_again, stage_work
from autopar.predicting.step import accumulation_s, optimizer_s, send_parts_s, state_copy_s
from autopar.predicting.table import Part, Pass
from autopar.predicting.work import Work
from autopar.simulating.costs import CONTEXT, EXPERT, TENSOR, ChunkCost, PassCost, Piece, Reduction, StageCost, StepCost
from autopar.simulating.schedules import BACKWARD, FORWARD, INPUTS, WEIGHTS


@dataclass(frozen=True)
class Slice:
    """One part of the model on one stage. parameters: [10] that are there for it alone. again: it recomputes."""

    name: str
    part: Part
    parameters: Floats
    again: bool


def step_cost(predictor: Predictor, layout: Layout) -> StepCost:
    """All that the engine needs to know of a layout that is known to be possible."""
    job, stages = predictor.job(layout), predictor.stages(layout)
    held = blocks_held([stage.blocks for stage in stages], layout.vpp)
    costs = [
        _StagePricer(job, stage, at, held[at], predictor.stage_memory(layout, stage, at)).cost
        for at, stage in enumerate(stages)
    ]
    send_s, unpack_s = send_parts_s(job)
    ranks = layout.devices // layout.pp
    return StepCost(tuple(costs), job.micro_batches, layout.schedule, send_s, unpack_s, ranks)


@dataclass(frozen=True)
class _StagePricer:
    """Prices one stage. held: the numbers of its blocks."""

    job: Job
    stage: Stage
    at: int
    held: list[int]
    memory: StageMemory

    @property
    def cost(self) -> StageCost:
        """Of the stage."""
        job, memory = self.job, self.memory
        chunks = tuple(
            ChunkCost(self._passes(slices), kept) for slices, kept in zip(self._chunks, self._kept_bytes, strict=True)
        )
        return StageCost(
            chunks=chunks,
            reductions=self._reductions(chunks),
            tied_s=tied_s(job, self.stage),
            optimizer_s=optimizer_s(job, self.stage),
            state_copy_s=state_copy_s(job, self.stage),
            returned_s=self._returned_s(),
            states_bytes=memory.total - memory.activations - memory.temporaries,
            temporaries_bytes=memory.temporaries,
        )

    @cached_property
    def _chunks(self) -> list[list[Slice]]:
        """The parts of each chunk, first to last. Of the blocks of a stage the first ones recompute, if not all do."""
        table, layout = self.job.table, self.job.layout
        again = run_again(layout, self.stage.blocks) if layout.recompute != "none" else 0
        chunks: list[list[Slice]] = []
        numbers = iter(self.held)
        for count in per_chunk([self.stage.blocks], layout.vpp)[0]:
            slices = [self._slice("before the blocks", table.before)] if self.stage.first and not chunks else []
            for number in islice(numbers, count):
                slices.append(self._slice(f"block {number}", table.block_at(number), again > 0))
                again -= 1
            if self.stage.last and len(chunks) == layout.vpp - 1:
                slices.append(self._slice("after the blocks", table.after))
            chunks.append(slices)
        return chunks

    def _slice(self, name: str, part: Part, again: bool = False) -> Slice:
        tied = part is self.job.table.after and self.stage.first
        return Slice(name, part, part.parameters - part.tied if tied else part.parameters, again)

    def _numbers(self, one: Slice) -> float:
        """Parameters of a rank."""
        return float(one.parameters @ self.job.weights)

    # -- passes -----------------------------------------------------------------------------

    def _passes(self, slices: list[Slice]) -> dict[str, PassCost]:
        if self.job.layout.schedule != "zero-bubble":
            return {FORWARD: self._forward(slices), BACKWARD: self._backward(slices, "all")}
        return {
            FORWARD: self._forward(slices),
            INPUTS: self._backward(slices, "inputs"),
            WEIGHTS: self._backward(slices, "weights"),
        }

    def _forward(self, slices: list[Slice]) -> PassCost:
        works = [(s, self._work(s.part.forward)) for s in slices]
        pieces = tuple(self._piece(s.name, work, gather=s) for s, work in works)
        return PassCost(pieces, sum(work.host_s for _, work in works) + self._waits_s)

    def _backward(self, slices: list[Slice], which: str) -> PassCost:
        """which: "all", or the gradients of "inputs" or "weights" only; what runs again does for the former."""
        pieces: list[Piece] = []
        host_s = 0.0
        for one in reversed(slices):
            gather: Slice | None = one if which != "weights" else None
            if one.again and which != "weights":
                work = self._again(one.part)
                pieces.append(self._piece(f"{one.name} again", work, gather=gather))
                host_s, gather = host_s + work.host_s, None
            back = one.part.backward
            of = {"all": back, "inputs": back.input_gradients, "weights": back.weight_gradients}[which]
            work = self._work(of)
            scatter = one if which != "inputs" else None
            if scatter is not None:
                work += Work(kernels_s=accumulation_s(self.job, self._numbers(one)))
            pieces.append(self._piece(one.name, work, gather=gather, scatter=scatter))
            host_s += work.host_s
        return PassCost(tuple(pieces), host_s + (self._waits_s if which != "weights" else 0.0))

    @property
    def _waits_s(self) -> float:
        """Of the host in one pass, which receives from the stage before and sends to the next."""
        return pause_s(self.job) * (2 - self.stage.first - self.stage.last)

    def _again(self, part: Part) -> Work:
        return again_work(part, self.job.layout, self.job.pricer, self.job.shape)

    def _work(self, of: Pass) -> Work:
        return self.job.pricer.work(of, self.job.shape)

    def _piece(self, name: str, work: Work, *, gather: Slice | None = None, scatter: Slice | None = None) -> Piece:
        """gather, scatter: whose parameters come before it and whose gradients go after it, with ZeRO stage 3."""
        gather_s = scatter_s = 0.0
        tensor_s = work.messages_s - work.context_s - work.expert_s
        if self.job.layout.zero == 3 and self.job.data_axis.size > 1:
            precision = self.job.precision
            if gather is not None:
                gather_s = self._in_one("all_gather", gather.parameters, precision.parameter)
            if scatter is not None:
                scatter_s = self._in_one("reduce_scatter", scatter.parameters, precision.gradient)
        lanes = ((CONTEXT, work.context_s), (EXPERT, work.expert_s), (TENSOR, tensor_s))
        waits = tuple((lane, s) for lane, s in lanes if s > 0)
        return Piece(name, work.kernels_s, waits, gather_s, scatter_s)

    def _in_one(self, kind: str, parameters: Floats, itemsize: float) -> float:
        """Seconds of [10] numbers in one message, or in two where experts are shared by other ranks."""
        sizes = [(one.numbers * itemsize, one.axis) for one in self.job.replicas(parameters) if one.numbers]
        return sum(messages(self.job, kind, nbytes, nbytes, axis)[1] for nbytes, axis in sizes)

    # -- the end of a step ------------------------------------------------------------------

    def _reductions(self, chunks: tuple[ChunkCost, ...]) -> tuple[Reduction, ...]:
        """The buckets of gradients, in the order in which they fill; beside compute those of the last round only."""
        job = self.job
        if job.data_axis.size == 1 or job.layout.zero == 3:
            return ()
        found: list[Reduction] = []
        for at, one in enumerate(job.held(self.stage)):
            nbytes = one.numbers * job.precision.gradient
            count, seconds = messages(job, reduction(job), nbytes, job.run.bucket_bytes, one.axis)
            if job.run.overlap:
                found += self._buckets(chunks, at, one.numbers, count, seconds)
            else:
                found += [Reduction(seconds)] * count * rounds(job)
        # those that are ready first; chunks run backward last to first, the pieces of one in their order
        return tuple(sorted(found, key=lambda r: (-r.after[0], r.after[1]) if r.after else (0, 0)))

    def _buckets(
        self, chunks: tuple[ChunkCost, ...], at: int, numbers: float, count: int, seconds: float
    ) -> Iterator[Reduction]:
        """Of the `at`-th of those that the same ranks have."""
        ready, filled = self._gradients_ready(chunks, at), 0.0
        piece: tuple[int, int] | None = None
        for bucket in range(1, count + 1):
            while ready and filled < numbers * bucket / count * (1 - 1e-9):
                piece, new = ready.pop(0)
                filled += new
            yield Reduction(seconds, piece)

    def _gradients_ready(self, chunks: tuple[ChunkCost, ...], at: int) -> list[tuple[tuple[int, int], float]]:
        """((chunk, piece), parameters whose gradients are there after it) in the order of the last backward passes.

        at: which of those that the same ranks have.
        """
        kind = WEIGHTS if self.job.layout.schedule == "zero-bubble" else BACKWARD
        found = []
        for chunk in reversed(range(len(chunks))):
            numbers = {s.name: self.job.replicas(s.parameters)[at].numbers for s in self._chunks[chunk]}
            pieces = chunks[chunk].passes[kind].pieces
            found += [((chunk, index), numbers.get(piece.name, 0.0)) for index, piece in enumerate(pieces)]
        return found

    def _returned_s(self) -> tuple[float, ...]:
        job = self.job
        work = stage_work(job.table, self.stage, job.layout, job.pricer, job.shape)
        return tuple(seconds for count, seconds in returned(job, self.stage, work) for _ in range(count))

    # -- memory -----------------------------------------------------------------------------

    @property
    def _kept_bytes(self) -> list[float]:
        """Of one micro-batch in each chunk: its share of what the stage keeps."""
        job = self.job
        each = self.memory.activations / in_flight(job.layout, job.micro_batches, self.at)
        kept = [sum(self._kept(one) for one in slices) for slices in self._chunks]
        return [each * (one / sum(kept) if sum(kept) else 1 / len(kept)) for one in kept]

    def _kept(self, one: Slice) -> float:
        job = self.job
        recompute = "none" if job.table.is_block(one.part) and not one.again else None
        return float(kept_of(one.part, job.table, job.layout, job.run, recompute=recompute) @ job.shape.weights)
