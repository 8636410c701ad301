"""Which blocks each pipeline stage holds, and what a micro-batch takes on each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.layouts import Layout
from autopar.predicting.run import Run
from autopar.predicting.sizes import KINDS, Floats, Shape
from autopar.predicting.table import ModelTable, Part
from autopar.predicting.work import Pricer, Work


@dataclass(frozen=True)
class Stage:
    """What one pipeline rank holds. first, last: whether it has what comes before and after the blocks."""

    blocks: int
    first: bool
    last: bool

    def parts(self, table: ModelTable) -> list[tuple[Part, int]]:
        """(part, how often)."""
        found = [(table.before, 1)] if self.first else []
        if table.block is not None and self.blocks:
            found.append((table.block, self.blocks))
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
    """Cut the blocks into stages as the run says (`Run.cut`); evenly where each rank has several."""
    p, cut = layout.pp, pricer.run.cut
    if p == 1:
        return [Stage(table.blocks, True, True)]
    counts = _even(table.blocks, p)
    if layout.vpp == 1 and table.block is not None and cut != "even":
        counts = _by_threshold(table, p) if cut == "threshold" else _balanced(table, pricer, shape, p)
    return [Stage(n, i == 0, i == p - 1) for i, n in enumerate(counts)]


def _even(blocks: int, stages: int) -> list[int]:
    return [blocks // stages + (1 if i < blocks % stages else 0) for i in range(stages)]


def _by_threshold(table: ModelTable, stages: int) -> list[int]:
    """Blocks in order, the next stage beginning after the block that exceeds its share of all parameters.

    So does nanotron (`build_model`): what comes before the blocks counts nothing, what comes after them its matrix.
    """
    assert table.block is not None
    block, after = float(table.block.parameters.sum()), float(table.after.parameters.sum())
    share = (table.blocks * block + after) / stages
    counts, at = [0] * stages, 0
    for number in range(1, table.blocks + 1):
        counts[at] += 1
        if number * block > share * (at + 1) and at < stages - 1:
            at += 1
    return counts


def _balanced(table: ModelTable, pricer: Pricer, shape: Shape, stages: int) -> list[int]:
    """Blocks go one by one to the stage that is then the least slow; one with the vocabulary may end up with none."""
    assert table.block is not None
    block_s = _both(table.block, pricer, shape)
    load = [0.0] * stages
    load[0] += _both(table.before, pricer, shape)
    load[-1] += _both(table.after, pricer, shape)
    counts = [0] * stages
    for _ in range(table.blocks):
        at = min(range(stages), key=lambda i: (load[i], -i))
        counts[at] += 1
        load[at] += block_s
    return counts


def _both(part: Part, pricer: Pricer, shape: Shape) -> float:
    return pricer.work(part.forward, shape).seconds + pricer.work(part.backward, shape).seconds


def stage_work(table: ModelTable, stage: Stage, layout: Layout, pricer: Pricer, shape: Shape) -> StageWork:
    """What one micro-batch takes on a stage."""
    forward, backward, again = Work(), Work(), Work()
    for part, times in stage.parts(table):
        forward += pricer.work(part.forward, shape) * times
        backward += pricer.work(part.backward, shape) * times
        if part is table.block:
            again += again_work(part, layout, pricer, shape) * run_again(layout, times)
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
    for part, times in stage.parts(table):
        again = run_again(layout, times) if part is table.block else times
        found = found + again * kept_of(part, table, layout, run)
        if again < times:
            found = found + (times - again) * kept_of(part, table, layout, run, recompute="none")
    return found


def kept_of(part: Part, table: ModelTable, layout: Layout, run: Run, *, recompute: str | None = None) -> Floats:
    """[5] bytes that one part holds of one micro-batch. recompute: of this part, if it is not what the layout says."""
    recompute = recompute or layout.recompute
    copies = part.gathered if run.keeps_gathered and layout.sp else 0.0
    if part is table.block and recompute == "full":
        return part.boundary
    if recompute != "selective":
        return part.kept + copies
    if run.selective == "products":  # of a block; what is before and after is not checkpointed
        return part.boundary + part.kept_products if part is table.block else part.kept + copies
    return part.kept_selective + copies
