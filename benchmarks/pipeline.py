"""Throughput of pipelines on gloo ranks: autopar beside `torch.distributed.pipelining` used by hand on the same cut.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/pipeline.py [--slept]

A Llama of random weights in float32, the same batches, fused AdamW on both sides; the two take turns, step by step.
Prints, for each schedule, samples/s of both (medians of wall time) and their ratio, and the CPU seconds that all ranks
together spend on a step, which other work on the machine changes less. Schedules can be compared with each other only
where every rank has a core of its own: with fewer cores, a rank that waits leaves its core to others, and a bubble
costs nothing. So a second table says how fast a core for every rank would be: the CPU seconds of each pass as recorded
in this run, replayed (`benchmarks/pass_times.py`). Exits with 1 where autopar is slower than torch by hand in wall
time, or where replayed samples/s do not rise in the order gpipe, 1f1b, interleaved, zero-bubble.

With `--slept` only autopar's schedules run, in wall time, on a machine with any number of cores: what a pass takes is
slept, from its floating-point operations (`benchmarks/slept_passes.py`); processes, schedules and messages are real.
Exits with 1 where a schedule is slower than the one before it. GPipe and 1F1B idle equally long, in theory: what
differs by less than one part in a hundred counts as equal.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, too

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar.runtime.rank_pipeline import RankPipeline
from autopar.runtime.staged import CompiledStages
from autopar.simulating.replay import Step
from autopar.staged import StagedPlan
from autopar.staging import stage_blocks
from benchmarks.pass_times import PassTimes, step_s
from benchmarks.slept_passes import SleptPasses, slept_step_s

VOCAB, SEQ, LR = 512, 128, 1e-3
LEAST_RATIO = 1.0  # of medians: as fast as by hand
SAME = 0.01  # of wall time slept: GPipe and 1F1B wait equally long, but for messages
SCHEDULES = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
    "zero-bubble": pipelining.ScheduleInterleavedZeroBubble,
}


def build_model(layers: int, hidden: int) -> nn.Module:
    """A Llama with seeded weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class HandStage(nn.Module):
    """Some layers of a Llama, with the embedding before the first and norm and head behind the last."""

    def __init__(self, model: Any, layers: range) -> None:
        super().__init__()
        inner = model.model
        self.rotary = inner.rotary_emb
        self.embed = inner.embed_tokens if layers.start == 0 else None
        self.layers = nn.ModuleList(inner.layers[i] for i in layers)
        last = layers.stop == len(inner.layers)
        self.norm, self.head = (inner.norm, model.lm_head) if last else (None, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens or hidden states in, hidden states or logits out."""
        if self.embed is not None:
            x = self.embed(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary(x, positions)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As transformers computes it for a causal language model."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def by_hand(model: nn.Module, plan: StagedPlan, micro_batches: int, kind: str) -> Side:
    """Torch's own pipeline, cut as the plan is; the loss on the last rank, else nan."""
    rank, ranks, blocks = dist.get_rank(), dist.get_world_size(), stage_blocks(plan)
    ends = [sum(blocks[: i + 1]) for i in range(len(blocks))]
    stages = [
        pipelining.PipelineStage(
            HandStage(model, range(ends[i] - blocks[i], ends[i])), i, len(blocks), torch.device("cpu")
        )
        for i in range(rank, len(blocks), ranks)
    ]
    several = kind in ("interleaved", "zero-bubble")
    schedule = SCHEDULES[kind](stages if several else stages[0], micro_batches, loss_fn=next_token_loss)
    optimizer = torch.optim.AdamW([p for s in stages for p in s.submod.parameters()], lr=LR, fused=True)
    first, last = rank == 0, rank == ranks - 1

    def step(tokens: torch.Tensor) -> float:
        losses: list[torch.Tensor] = []
        given = (tokens,) if first else ()
        schedule.step(*given, target=tokens if last else None, losses=losses if last else None, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.stack(losses).detach().mean()) if last else float("nan")

    return Side(step, PassTimes(stages))


def by_autopar(program: autopar.Program, pipeline: RankPipeline) -> Side:
    """Autopar's."""
    optimizer = torch.optim.AdamW(program.parameters(), lr=LR, fused=True)

    def step(tokens: torch.Tensor) -> float:
        loss = program.train_step(input_ids=tokens, labels=tokens)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return Side(step, PassTimes(pipeline.stages))


@dataclass
class Side:
    """One way to make a step, and what was measured: seconds of each, and CPU seconds of this process in all."""

    run: Callable[[torch.Tensor], float]
    passes: PassTimes
    seconds: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    def step(self, tokens: torch.Tensor, record: bool) -> float:
        """Run a step; its loss."""
        dist.barrier()
        begin, cpu = time.perf_counter(), time.process_time()
        with self.passes.step(record):
            loss = self.run(tokens)
        cpu_s = time.process_time() - cpu
        dist.barrier()
        if record:
            self.seconds.append(time.perf_counter() - begin)
            self.cpu_s += cpu_s
        return loss

    def of_all_ranks(self, executed: Sequence[Sequence[Step]]) -> tuple[float, float, float]:
        """Of a step: median seconds as the last rank saw them, CPU seconds of all ranks together, and its seconds with
        a core for every rank."""
        cpu_s = torch.tensor(self.cpu_s / len(self.seconds))
        dist.all_reduce(cpu_s)
        median_s = torch.tensor(statistics.median(self.seconds))
        dist.broadcast(median_s, src=dist.get_world_size() - 1)
        return float(median_s), float(cpu_s), step_s(executed, *self.passes.medians())


class Row(NamedTuple):
    """Seconds of a step: wall, CPU, and with a core for every rank."""

    wall_s: float
    cpu_s: float
    alone_s: float
    hand_wall_s: float
    hand_cpu_s: float
    hand_alone_s: float


def compiled_for(
    kind: str, model: nn.Module, tokens: torch.Tensor, args: argparse.Namespace
) -> tuple[autopar.Program, CompiledStages]:
    """Autopar's program of a schedule, a stage a rank; interleaved: two."""
    chunks = 2 if kind == "interleaved" else 1
    pin = {"pp": dist.get_world_size(), "micro_batch": args.micro_batch, "schedule": kind, "vpp": chunks}
    example = ((), {"input_ids": tokens, "labels": tokens})
    program = autopar.compile(model, autopar.ClusterSpec.local(), pin=pin, example_inputs=example)
    compiled = program.prepare(example)
    assert isinstance(compiled, CompiledStages)
    return program, compiled


def sleep(args: argparse.Namespace) -> int:
    """Autopar's schedules with passes that sleep; a table on the last rank."""
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        print(f"{dist.get_world_size()} gloo ranks, passes slept at {args.flops_per_s:g} FLOP/s a rank, wall clock")
        print(f"{'samples/s':<12} {'measured':>8} {'theory':>8}   (theory: the same passes, and nothing else)")
    found = {}
    for kind in args.schedules:
        tokens = torch.randint(VOCAB, (args.batch, SEQ), generator=torch.Generator().manual_seed(0))
        program, compiled = compiled_for(kind, build_model(args.layers, args.hidden), tokens, args)
        passes = SleptPasses(compiled.pipeline.stages, args.flops_per_s)
        found[kind] = slept_step_s(partial(program.train_step, input_ids=tokens, labels=tokens), args.steps)
        alone_s = passes.alone_s(compiled.pipeline.schedule.steps)
        if last:
            print(f"{kind:<12} {args.batch / found[kind]:>8.3f} {args.batch / alone_s:>8.3f}", flush=True)
    times = [found[kind] for kind in SCHEDULES if kind in found]
    return int(any(later > (1 + SAME) * before for before, later in pairwise(times)))


def compare(kind: str, args: argparse.Namespace) -> tuple[Row, float]:
    """What steps of autopar and of torch by hand took, and the largest difference of their losses."""
    model = build_model(args.layers, args.hidden)
    tokens = torch.randint(VOCAB, (args.batch, SEQ), generator=torch.Generator().manual_seed(0))
    program, compiled = compiled_for(kind, copy.deepcopy(model), tokens, args)
    mine = by_autopar(program, compiled.pipeline)
    theirs = by_hand(model, compiled.plan, args.batch // args.micro_batch, kind)
    worst = 0.0
    for number in range(args.warmup + args.steps):
        losses = [side.step(tokens, record=number >= args.warmup) for side in (mine, theirs)]
        if losses[1] == losses[1]:  # on the last rank
            worst = max(worst, abs(losses[0] - losses[1]))
    executed = compiled.pipeline.schedule.steps
    return Row(*mine.of_all_ranks(executed), *theirs.of_all_ranks(executed)), worst


def main() -> int:
    """All schedules; a table on the last rank, which knows both losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--slept", action="store_true", help="passes sleep instead of computing; wall clock")
    parser.add_argument("--flops-per-s", type=float, default=1.5e10, help="with --slept: of a rank")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if args.slept:
        status = sleep(args)
        dist.destroy_process_group()
        return status
    rows: dict[str, Row] = {}
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        print(f"{dist.get_world_size()} gloo ranks, {os.cpu_count()} cores, torch {torch.__version__}")
        print(
            f"{'samples/s':<12} {'autopar':>8} {'by hand':>8} {'ratio':>6}   {'CPU s':>6} {'by hand':>8}  loss differs"
        )
    for kind in args.schedules:
        row, worst = compare(kind, args)
        rows[kind] = row
        if last:
            rates = f"{args.batch / row.wall_s:>8.2f} {args.batch / row.hand_wall_s:>8.2f}"
            ratio = f"{row.hand_wall_s / row.wall_s:>6.3f}"
            print(f"{kind:<12} {rates} {ratio}   {row.cpu_s:>6.3f} {row.hand_cpu_s:>8.3f}  {worst:.1e}", flush=True)
    if last:
        print_replayed(rows, args.batch)
    dist.destroy_process_group()
    slow = [kind for kind, row in rows.items() if row.hand_wall_s / row.wall_s < LEAST_RATIO]
    times = [rows[kind].alone_s for kind in SCHEDULES if kind in rows]
    return 1 if slow or times != sorted(times, reverse=True) else 0


def print_replayed(rows: Mapping[str, Row], batch: int) -> None:
    """The second table."""
    print("with a core for every rank: CPU seconds of passes as recorded above, replayed")
    print(f"{'samples/s':<12} {'autopar':>8} {'by hand':>8} {'ratio':>6}")
    for kind, row in rows.items():
        rates = f"{batch / row.alone_s:>8.2f} {batch / row.hand_alone_s:>8.2f}"
        print(f"{kind:<12} {rates} {row.hand_alone_s / row.alone_s:>6.3f}")


if __name__ == "__main__":
    sys.exit(main())
