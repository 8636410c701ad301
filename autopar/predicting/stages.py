"""Which blocks each pipeline stage holds, and what a micro-batch takes on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autopar.blocks import cut_counts
from autopar.layouts import Layout
from autopar.predicting.run import Run
from autopar.predicting.sizes import KINDS, Floats, Shape
from autopar.predicting.table import ModelTable, Part
from autopar.predicting.work import Pricer, Work

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds. first, last: whether it has what comes before and after the blocks.

    held: which blocks, by number, where they are not alike.
    """

    blocks: int
    first: bool
    last: bool
    held: tuple[int, ...] = ()

    @staticmethod
    def whole(table: ModelTable) -> Stage:
        """The one that holds everything."""
        return Stage.holding(table, range(table.blocks), True, True)

    @staticmethod
    def holding(table: ModelTable, numbers: Sequence[int], first: bool, last: bool) -> Stage:
        """The one that holds these blocks."""
        return Stage(len(numbers), first, last, tuple(numbers) if table.own else ())

    def parts(self, table: ModelTable) -> list[tuple[Part, int]]:
        """(part, how often)."""
        found = [(table.before, 1)] if self.first else []
        if self.held:
            found += [(table.block_at(number), 1) for number in self.held]
        elif self.blocks:
            found.append((table.block_at(0), self.blocks))
        return [*found, (table.after, 1)] if self.last else found


@dataclass(frozen=True)
class StageWork:
    """Forward and backward pass of one micro-batch on one stage; `again` is the recomputation in the backward."""

    forward: Work
    backward: Work
    again: Work

    @property
    def whole_backward(self) -> Work:
        """With what is recomputed."""
        return self.backward + self.again


def split(table: ModelTable, layout: Layout, pricer: Pricer, shape: Shape) -> list[Stage]:
    """Cut the blocks into stages as the layout or the run says (`Run.cut`); evenly where each rank has several."""
    p, cut = layout.pp, pricer.run.cut
    if p == 1:
        return [Stage.whole(table)]
    counts = _even(table.blocks, p)
    if layout.cut is not None:
        counts = list(cut_counts(layout, table.names))
    elif cut == "ends" and not table.own:
        counts = _even(table.blocks + 2, p)
        counts[0], counts[-1] = counts[0] - 1, counts[-1] - 1
    elif layout.vpp == 1 and table.kinds and cut != "even":
        counts = _by_threshold(table, p) if cut == "threshold" else _balanced(table, pricer, shape, p)
    held = blocks_held(counts, layout.vpp)
    return [Stage.holding(table, numbers, i == 0, i == p - 1) for i, numbers in enumerate(held)]


def per_chunk(counts: Sequence[int], chunks: int) -> list[list[int]]:
    """Of the blocks of every rank, how many are in each of its chunks."""
    return [[count // chunks + (chunk < count % chunks) for chunk in range(chunks)] for count in counts]


def blocks_held(counts: Sequence[int], chunks: int) -> list[list[int]]:
    """The numbers of the blocks of every rank: micro-batches go around all ranks once a chunk."""
    held: list[list[int]] = [[] for _ in counts]
    sizes, at = per_chunk(counts, chunks), 0
    for chunk in range(chunks):
        for rank, of_rank in enumerate(sizes):
            held[rank] += range(at, at + of_rank[chunk])
            at += of_rank[chunk]
    return held


def _even(blocks: int, stages: int) -> list[int]:
    return [blocks // stages + (1 if i < blocks % stages else 0) for i in range(stages)]


def _by_threshold(table: ModelTable, stages: int) -> list[int]:
    """Blocks in order, the next stage beginning after the block that exceeds its share of all parameters.

    So does nanotron (`build_model`): what comes before the blocks counts nothing, what comes after them its matrix.
    """
    sizes = [float(table.block_at(number).parameters.sum()) for number in range(table.blocks)]
    share = (sum(sizes) + float(table.after.parameters.sum())) / stages
    counts, at, so_far = [0] * stages, 0, 0.0
    for size in sizes:
        counts[at] += 1
        so_far += size
        if so_far > share * (at + 1) and at < stages - 1:
            at += 1
    return counts


def _balanced(table: ModelTable, pricer: Pricer, shape: Shape, stages: int) -> list[int]:
    """Blocks go one by one to the stage that is then the least slow; one with the vocabulary may end up with none."""
    if table.own:
        return _balanced_own(table, pricer, shape, stages)
    block_s = _both(table.block_at(0), pricer, shape)
    load = [0.0] * stages
    load[0] += _both(table.before, pricer, shape)
    load[-1] += _both(table.after, pricer, shape)
    counts = [0] * stages
    for _ in range(table.blocks):
        at = min(range(stages), key=lambda i: (load[i], -i))
        counts[at] += 1
        load[at] += block_s
    return counts


def _balanced_own(table: ModelTable, pricer: Pricer, shape: Shape, stages: int) -> list[int]:
    """Blocks of different kinds in order, such that the slowest stage is as fast as can be; every stage has one."""
    seconds = [_both(part, pricer, shape) for part in table.own]
    seconds[0] += _both(table.before, pricer, shape)
    seconds[-1] += _both(table.after, pricer, shape)
    until = np.concatenate([[0.0], np.cumsum(seconds)])
    slowest = np.where(np.arange(len(until)) > 0, until, np.inf)  # of one stage that ends there
    begins: list[Ints] = []
    for _ in range(stages - 1):
        ends = np.arange(len(until))
        cost = np.maximum(slowest[None, :], until[:, None] - until[None, :])  # [end, begin of the last stage]
        cost[ends[None, :] >= ends[:, None]] = np.inf
        begins.append(cost.argmin(axis=1))
        slowest = cost.min(axis=1)
    counts, end = [], table.blocks
    for begin in reversed(begins):
        counts.append(end - int(begin[end]))
        end = int(begin[end])
    return [end, *reversed(counts)]


def _both(part: Part, pricer: Pricer, shape: Shape) -> float:
    return pricer.work(part.forward, shape).seconds + pricer.work(part.backward, shape).seconds


def stage_work(table: ModelTable, stage: Stage, layout: Layout, pricer: Pricer, shape: Shape) -> StageWork:
    """What one micro-batch takes on a stage."""
    forward, backward, again = Work(), Work(), Work()
    left = run_again(layout, stage.blocks)
    for part, times in stage.parts(table):
        forward += pricer.work(part.forward, shape) * times
        backward += pricer.work(part.backward, shape) * times
        if table.is_block(part):
            again += again_work(part, layout, pricer, shape) * min(left, times)
            left = max(0, left - times)
    return StageWork(forward, backward, again)


def run_again(layout: Layout, blocks: int) -> int:
    """How many of the blocks of one rank recompute, if any do."""
    return blocks if layout.recompute_blocks is None else min(blocks, layout.recompute_blocks)


def again_work(block: Part, layout: Layout, pricer: Pricer, shape: Shape) -> Work:
    """What of a block runs again in the backward pass, if it recomputes."""
    if layout.recompute == "full":
        return pricer.work(block.forward, shape)
    if layout.recompute == "selective":
        return pricer.work(block.again_products if pricer.run.selective == "products" else block.again, shape)
    return Work()


def kept_on(stage: Stage, table: ModelTable, layout: Layout, run: Run) -> Floats:
    """[5] bytes that a stage holds of one micro-batch from forward to backward."""
    found: Floats = np.zeros(KINDS)
    left = run_again(layout, stage.blocks)
    for part, times in stage.parts(table):
        again = times
        if table.is_block(part):
            again = min(left, times)
            left -= again
        found = found + again * kept_of(part, table, layout, run)
        if again < times:
            found = found + (times - again) * kept_of(part, table, layout, run, recompute="none")
    return found


def kept_of(part: Part, table: ModelTable, layout: Layout, run: Run, *, recompute: str | None = None) -> Floats:
    """[5] bytes that one part holds of one micro-batch. recompute: of this part, if it is not what the layout says."""
    recompute = recompute or layout.recompute
    copies = part.gathered if run.keeps_gathered and layout.sp else 0.0
    if table.is_block(part) and recompute == "full":
        return part.boundary
    if recompute != "selective":
        return part.kept + copies
    if run.selective == "products":  # of a block; what is before and after is not checkpointed
        return part.boundary + part.kept_products if table.is_block(part) else part.kept + copies
    return part.kept_selective + copies
