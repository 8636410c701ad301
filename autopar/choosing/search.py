"""Branch and bound over layouts: the fastest that fits, and a proof.

Cells are visited by their lower bound (`bounds.py`). In a cell, every leaf is first priced without recomputation, which
is never slower than with it: only where that could win, the least recomputation that fits the memory is looked for. The
search ends when no cell that is left could be faster than the best layout found; if the time is up before that, the
smallest bound that is left says how far the answer may be off.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from autopar.choosing.bounds import GroupCosts
from autopar.choosing.cells import Cell, Cells
from autopar.choosing.shortfall import shortfall
from autopar.choosing.space import Group, Space
from autopar.errors import Infeasible
from autopar.layouts import Layout
from autopar.predicting.memory import StageMemory
from autopar.predicting.predict import Prediction, Predictor
from autopar.predicting.stages import Stage
from autopar.units import bytes_text

KEPT = 12  # alternatives that a result holds
Progress = Callable[[str], None]


@dataclass(frozen=True)
class LayoutChoice:
    """The fastest layout.

    alternatives: the best of other cells that were priced, fastest first. bound_s: no layout of the space is faster.
    devices: that the best one uses. cells: that there are; visited: that could not be ruled out by their bound.
    priced: layouts. solve_s: of this process.
    """

    best: Prediction
    alternatives: tuple[Prediction, ...]
    bound_s: float
    devices: int
    cells: int
    visited: int
    priced: int
    solve_s: float

    @property
    def gap(self) -> float:
        """Proven, relative."""
        return max(0.0, 1 - self.bound_s / self.best.step_time_s)


def rounded(seconds: float) -> float:
    """To what every processor agrees on: sums of products differ in their last digits between them."""
    return float(f"{seconds:.12g}")


class LayoutSearch:
    """The search for one model, batch and cluster."""

    def __init__(self, predictor: Predictor, space: Space, *, progress: Progress | None = None) -> None:
        self.predictor, self.space, self.progress = predictor, space, progress
        self._parts: dict[int, Predictor] = {}
        self._states_of: dict[int, float] = {}
        self.found: dict[tuple[Group, int, int], Prediction] = {}
        self.priced = 0

    def run(self, time_limit_s: float) -> LayoutChoice:
        """The fastest layout that fits; raises Infeasible."""
        began = time.perf_counter()
        self._prepare()
        cells = Cells.of(self.space, self._one_block_fits, lambda group: GroupCosts.of(self.predictor, group))
        bound_s, visited, timed_out = float("inf"), 0, False
        for cell in cells:
            timed_out = time.perf_counter() - began > time_limit_s
            if cell.bound_s >= self._best_s or timed_out:
                bound_s = cell.bound_s
                break
            visited += 1
            self._visit(cell)
            if self.progress and visited % 20 == 0:
                self.progress(f"layouts: {self.priced} priced, {visited} of {len(cells)} cells")
        if not self.found:
            raise self._infeasible(timed_out)
        best, *others = sorted(self.found.values(), key=lambda p: (rounded(p.step_time_s), str(p.layout)))
        solve_s = time.perf_counter() - began
        return LayoutChoice(
            best, tuple(others[:KEPT]), min(bound_s, best.step_time_s), best.layout.devices, len(cells), visited,
            self.priced, solve_s,
        )  # fmt: skip

    @property
    def _best_s(self) -> float:
        return min((p.step_time_s for p in self.found.values()), default=float("inf"))

    def _prepare(self) -> None:
        """All groups are priced for their bounds: together, which is quicker."""
        shapes = [self.predictor.shape(group.layout(1, group.least_dp)) for group in self.space.groups()]
        for part in self.predictor.table.parts:
            for one in (part.forward, part.backward):
                self.predictor.pricer.prepare(one, shapes)

    def _one_block_fits(self, group: Group) -> bool:
        """Whether the tensors of one micro-batch have room in a stage of one block, or of what comes after the blocks.

        States, and what the allocator adds, depend on the other degrees and are left out.
        """
        layout = group.layout(1, group.least_dp, recompute="full")
        table = self.predictor.table
        stages = [Stage(0, False, True), *(Stage.holding(table, [number], False, False) for number in table.firsts)]
        held = [self.predictor.stage_memory(layout, stage, 0) for stage in stages]
        return all(m.activations + m.temporaries <= self.predictor.limit_bytes for m in held)

    # -- one cell -----------------------------------------------------------------------------

    def _visit(self, cell: Cell) -> None:
        predictor, key = self._on(cell.devices), (cell.group, cell.pp, cell.dp)
        if self._states(cell.group) / (cell.pp * cell.dp * cell.group.cp) > predictor.limit_bytes:
            return
        leaves = [leaf for leaf in self.space.leaves(cell.group, cell.pp, cell.dp) if predictor.host_holds(leaf)]
        if not any(m.total <= predictor.limit_bytes for _, m in self._lean(predictor, leaves)):
            return
        for floor_s, layout in sorted(self._floors(predictor, leaves), key=lambda pair: rounded(pair[0])):
            known = self.found.get(key)
            if floor_s >= (known.step_time_s if known else self._best_s):
                break
            for fitting in self._fitting(predictor, layout):
                made = self._price(predictor, fitting)
                if key not in self.found or rounded(made.step_time_s) < rounded(self.found[key].step_time_s):
                    self.found[key] = made

    def _floors(self, predictor: Predictor, leaves: list[Layout]) -> Iterator[tuple[float, Layout]]:
        """Seconds of each leaf without recomputation.

        What the ZeRO stage costs does not depend on the schedule, nor the other way round: each is priced once. Stage 2
        alone does: what it reduces, and how often, follows from the interleaving.
        """
        first = leaves[0]
        by_zero: dict[int, float] = {}
        by_schedule: dict[tuple[str, int], float] = {}
        for layout in leaves:
            if layout.zero == 2:
                continue
            if layout.zero not in by_zero:
                by_zero[layout.zero] = self._step_s(predictor, replace(first, zero=layout.zero))
            order = (layout.schedule, layout.vpp)
            if order not in by_schedule:
                there = replace(first, schedule=layout.schedule, vpp=layout.vpp)
                by_schedule[order] = self._step_s(predictor, there)
        for layout in leaves:
            if layout.zero == 2:
                yield self._step_s(predictor, layout), layout
                continue
            schedule_s = by_schedule[layout.schedule, layout.vpp] - by_zero[first.zero]
            yield by_zero[layout.zero] + schedule_s, layout

    def _states(self, group: Group) -> float:
        """Bytes of parameters, gradients and optimizer on one tensor rank; a cell spreads them at best evenly."""
        if group.tp not in self._states_of:
            most = self.space.offloads[-1]
            m = self.predictor.memory(Layout(tp=group.tp, grad_dtype=self.space.grad_dtype, offload=most))
            self._states_of[group.tp] = m.parameters + m.gradients + m.optimizer
        return self._states_of[group.tp]

    def _lean(self, predictor: Predictor, leaves: list[Layout]) -> Iterator[tuple[Layout, StageMemory]]:
        """The leaves of a cell with everything run again and on the host that may be; the leanest come first, mostly.

        Which of them needs least depends: ZeRO-3 holds two gathered blocks, and interleaving cuts the blocks evenly.
        """
        kind, seen = self.space.recomputations()[-1], set()
        for leaf in sorted(leaves, key=lambda one: (one.vpp, -one.zero)):
            if (leaf.vpp, leaf.zero) not in seen:  # 1F1B comes first, and holds no more than zero-bubble
                seen.add((leaf.vpp, leaf.zero))
                lean = replace(leaf, recompute=kind, recompute_blocks=self._blocks(kind))
                lean = next(self._offloaded(predictor, lean, most_first=True), lean)
                yield lean, predictor.memory(lean)

    def leanest(self, enough: float = 0.0) -> tuple[Layout, StageMemory] | None:
        """The layout that needs least memory, or the first found that needs no more than `enough` bytes.

        It has the smallest micro-batch, and everything runs again. More data-parallel ranks need no more each, but that
        one alone has nobody to exchange gradients with: of every pipeline degree the most are looked at, and the least.
        """
        groups = list(self.space.groups())[::-1]  # those with most tensor and context ranks first: the leanest, mostly
        smallest = min((g.micro_batch for g in groups), default=0)
        best: tuple[Layout, StageMemory] | None = None
        for group in groups:
            pps, dps = self.space.cells(group)
            for pp in sorted(set(pps.tolist())) if group.micro_batch == smallest else []:
                for dp in sorted({int(dps[pps == pp].max()), int(dps[pps == pp].min())}, reverse=True):
                    if best and best[1].total <= enough:
                        return best
                    if best and self._states(group) / (pp * dp * group.cp) > best[1].total:
                        continue
                    there = self._on(group.tp * group.cp * pp * dp)
                    leaves = [leaf for leaf in self.space.leaves(group, pp, dp) if there.host_holds(leaf)]
                    lean = self._lean(there, leaves)
                    best = min(lean if best is None else (best, *lean), key=lambda pair: pair[1].total, default=best)
        return best

    def _blocks(self, kind: str) -> int | None:
        pinned: int | None = self.space.pin.get("recompute_blocks")
        return pinned if kind == "full" else None

    def _offloaded(self, predictor: Predictor, layout: Layout, *, most_first: bool = False) -> Iterator[Layout]:
        """With what may wait on the host, as far as the host has room for it."""
        offloads = self.space.offloads[::-1] if most_first else self.space.offloads
        changed = (replace(layout, offload=offload) for offload in offloads)
        return (one for one in changed if predictor.host_holds(one))

    def _fitting(self, predictor: Predictor, layout: Layout) -> Iterator[Layout]:
        """All that may be the fastest that fits: something on the host may spare recomputation."""
        least = self.space.recomputations()[0]
        for one in self._offloaded(predictor, layout):
            found = list(self._recomputed(predictor, one))
            yield from found
            if found and least != "full" and found[-1].recompute == least:
                return

    def _recomputed(self, predictor: Predictor, layout: Layout) -> Iterator[Layout]:
        """With the least recomputation of each kind that fits; nothing more once a lesser kind does."""
        for kind in self.space.recomputations():
            whole = replace(layout, recompute=kind, recompute_blocks=self._blocks(kind))
            if predictor.memory(whole).total > predictor.limit_bytes:
                continue
            yield self._fewest(predictor, whole) if kind == "full" else whole
            if kind == "none":
                return

    def _fewest(self, predictor: Predictor, whole: Layout) -> Layout:
        """As few recomputed blocks as fit, by bisection: each gives memory."""
        if "recompute_blocks" in self.space.pin:
            return whole
        most = max(s.blocks for s in predictor.stages(whole))
        low, high = 0, most  # `high` blocks fit
        while high - low > 1:
            middle = (low + high) // 2
            fits = predictor.memory(replace(whole, recompute_blocks=middle)).total <= predictor.limit_bytes
            low, high = (low, middle) if fits else (middle, high)
        return replace(whole, recompute_blocks=high) if high < most else whole

    # -- helpers --------------------------------------------------------------------------------

    def _on(self, devices: int) -> Predictor:
        if devices not in self._parts:
            self._parts[devices] = self.predictor.on(self.predictor.cluster.part(devices))
        return self._parts[devices]

    def _price(self, predictor: Predictor, layout: Layout) -> Prediction:
        self.priced += 1
        return predictor.price(layout)

    def _step_s(self, predictor: Predictor, layout: Layout) -> float:
        self.priced += 1
        return predictor.step_time_s(layout)

    def _infeasible(self, timed_out: bool) -> Infeasible:
        if timed_out:
            return Infeasible(
                f"no layout that fits was found in the time; raise time_limit_s ({self.priced} were priced)"
            )
        leanest = self.leanest()
        if leanest is None:
            why = self.space.conflict()
            return Infeasible(f"no layout satisfies the pins, the batch and the model together{why}; remove a pin")
        layout, memory = leanest
        lacking = shortfall(self._on(layout.devices), layout)
        return Infeasible(
            f"no layout fits {bytes_text(self.predictor.limit_bytes)} per device: the leanest needs "
            f"{bytes_text(memory.total)} ({layout}), {lacking}",
            needed_bytes=math.ceil(memory.total),
            where=lacking.where,
            short_by_bytes=lacking.short_by_bytes,
            advice="use more devices, a smaller batch or sequence, or devices with more memory",
        )
