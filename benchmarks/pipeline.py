"""Throughput of pipelines on gloo ranks: autopar beside `torch.distributed.pipelining` used by hand on the same cut.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/pipeline.py

A Llama of random weights in float32, the same batches, fused AdamW on both sides; the two take turns, step by step.
Prints, for each schedule, samples/s of both (medians) and their ratio, and the CPU seconds that all ranks together
spend on a step, which other work on the machine changes less. Schedules can be compared with each other only where
every rank has a core of its own: with fewer cores, a rank that waits leaves its core to others, and a bubble costs
nothing. Exits with 1 where autopar is slower by more than noise.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar.staged import StagedPlan
from autopar.staging import stage_blocks

VOCAB, SEQ, LR = 512, 128, 1e-3
LEAST_RATIO = 1.0  # of medians: as fast as by hand
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


def by_hand(model: nn.Module, plan: StagedPlan, micro_batches: int, kind: str) -> Callable[[torch.Tensor], float]:
    """One step of torch's own pipeline, cut as the plan is; the loss on the last rank, else nan."""
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

    return step


def by_autopar(program: autopar.Program) -> Callable[[torch.Tensor], float]:
    """One step of autopar's."""
    optimizer = torch.optim.AdamW(program.parameters(), lr=LR, fused=True)

    def step(tokens: torch.Tensor) -> float:
        loss = program.train_step(input_ids=tokens, labels=tokens)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


@dataclass
class Measured:
    """Of one side: seconds of each step, and CPU seconds of this process in all of them."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: float = 0.0

    def of_all_ranks(self) -> tuple[float, float]:
        """Median seconds of a step as the last rank saw them, and CPU seconds of a step of all ranks together."""
        cpu_s = torch.tensor(self.cpu_s / len(self.seconds))
        dist.all_reduce(cpu_s)
        median_s = torch.tensor(statistics.median(self.seconds))
        dist.broadcast(median_s, src=dist.get_world_size() - 1)
        return float(median_s), float(cpu_s)


def timed(step: Callable[[torch.Tensor], float], tokens: torch.Tensor, into: Measured | None) -> float:
    """Run a step; its loss."""
    dist.barrier()
    begin, cpu = time.perf_counter(), time.process_time()
    loss = step(tokens)
    cpu_s = time.process_time() - cpu
    dist.barrier()
    if into is not None:
        into.seconds.append(time.perf_counter() - begin)
        into.cpu_s += cpu_s
    return loss


def compare(kind: str, args: argparse.Namespace) -> tuple[Measured, Measured, float]:
    """What steps of autopar and of torch by hand took, and the largest difference of their losses."""
    model = build_model(args.layers, args.hidden)
    chunks = 2 if kind == "interleaved" else 1
    pin = {"pp": dist.get_world_size(), "micro_batch": args.micro_batch, "schedule": kind, "vpp": chunks}
    tokens = torch.randint(VOCAB, (args.batch, SEQ), generator=torch.Generator().manual_seed(0))
    example = ((), {"input_ids": tokens, "labels": tokens})
    program = autopar.compile(copy.deepcopy(model), autopar.ClusterSpec.local(), pin=pin, example_inputs=example)
    assert isinstance(program.plan, StagedPlan)
    sides = by_autopar(program), by_hand(model, program.plan, args.batch // args.micro_batch, kind)
    measured = Measured(), Measured()
    worst = 0.0
    for number in range(args.warmup + args.steps):
        warm = number >= args.warmup
        losses = [timed(step, tokens, into if warm else None) for step, into in zip(sides, measured, strict=True)]
        if losses[1] == losses[1]:  # on the last rank
            worst = max(worst, abs(losses[0] - losses[1]))
    return (*measured, worst)


def main() -> int:
    """All schedules; a table on the last rank, which knows both losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    slow = []
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        print(f"{dist.get_world_size()} gloo ranks, {os.cpu_count()} cores, torch {torch.__version__}")
        print(
            f"{'samples/s':<12} {'autopar':>8} {'by hand':>8} {'ratio':>6}   {'CPU s':>6} {'by hand':>8}   loss differs"
        )
    for kind in args.schedules:
        mine, theirs, worst = compare(kind, args)
        (mine_s, mine_cpu_s), (theirs_s, theirs_cpu_s) = mine.of_all_ranks(), theirs.of_all_ranks()
        if last:
            rates = f"{args.batch / mine_s:>8.2f} {args.batch / theirs_s:>8.2f} {theirs_s / mine_s:>6.3f}"
            print(f"{kind:<12} {rates}   {mine_cpu_s:>6.3f} {theirs_cpu_s:>8.3f}   {worst:.1e}", flush=True)
        if theirs_s / mine_s < LEAST_RATIO:
            slow.append(kind)
    dist.destroy_process_group()
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
