"""Long sequences: throughput beside torch's own context parallel, and how memory falls as ranks share a sequence.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/long_sequence.py
    python benchmarks/long_sequence.py --memory          # one process: predictions, no model runs

The first prints tokens/s of a Llama of random weights (float32, fused AdamW, one sequence, the same kernels), and their
ratio; both sides take turns, step by step, medians. It exits with 1 where autopar is slower. torch's
`context_parallel` stops on CPUs, and the error is printed: it takes over three attention ops of GPUs, and the CPU's is
none of them. What it does there runs here all the same: torch's own load balancing, ring forward and ring backward,
called with the CPU's kernel. Keys go around by all-gather (torch's default) and by all-to-all; the faster one counts.

The second prints bytes of activations by rank, and the plan of Llama-3 8B for 1,048,576 tokens on 64 H100.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, too

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar.errors import Infeasible
from autopar.models import load_model
from benchmarks.torch_ring import ROTATE, context_parallel_error, ring_step

VOCAB, LR = 512, 1e-3
LEAST_RATIO = 1.0  # of medians
LOSS_TOLERANCE = 1e-4  # float32, relative, after as many steps
HEADS = {"ring": (6, 2), "free": (8, 4)}  # of queries and keys; four ranks do not divide the first
MILLION, GPUS = 1_048_576, 64
Step = Callable[[torch.Tensor], float]


def build_model(heads: tuple[int, int], args: argparse.Namespace) -> nn.Module:
    """A Llama with seeded weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32 * heads[0],
        intermediate_size=96 * heads[0],
        num_hidden_layers=args.layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=args.tokens,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def by_autopar(model: nn.Module, tokens: torch.Tensor) -> tuple[Step, str]:
    """A step of autopar's, and how its attention sees the whole sequence."""
    ranks = dist.get_world_size()
    example = ((), {"input_ids": tokens, "labels": tokens})
    pin = {"dp": 1, "cp": ranks, "tp": 1, "zero": 0, "recompute": "none"}
    program = autopar.compile(model, autopar.ClusterSpec.local(), pin=pin, example_inputs=example)
    optimizer = torch.optim.AdamW(program.parameters(), lr=LR, fused=True)

    def step(ids: torch.Tensor) -> float:
        loss = program.train_step(input_ids=ids, labels=ids)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    assert program.plan is not None
    rings = any(r.lowering == "ring" for d in program.plan.decisions.nodes.values() for r in d.rules)
    return step, "around a ring" if rings else "by heads"


def compare(name: str, args: argparse.Namespace) -> float:
    """Prints a line; the ratio of tokens/s, autopar over the faster of torch's ways."""
    tokens = torch.randint(VOCAB, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    model = build_model(HEADS[name], args)
    mine, how = by_autopar(copy.deepcopy(model), tokens)
    steps = {"autopar": mine, **{rotate: ring_step(copy.deepcopy(model), rotate, LR) for rotate in ROTATE}}
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    losses: dict[str, float] = {}
    for number in range(args.warmup + args.steps):
        for side, step in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            losses[side] = step(tokens)
            dist.barrier()
            if number >= args.warmup:
                seconds[side].append(time.perf_counter() - begin)
    medians = torch.tensor([statistics.median(s) for s in seconds.values()])
    dist.broadcast(medians, src=0)
    own, *others = medians.tolist()
    worst = max(abs(losses[side] / losses["autopar"] - 1) for side in ROTATE)
    if worst > LOSS_TOLERANCE:
        raise SystemExit(f"{name}: the losses differ by {worst:.1e} of their size; the two do not compute the same")
    if dist.get_rank() == 0:
        rates = " ".join(f"{args.tokens / s:>10.0f}" for s in (own, *others))
        print(f"{how:<14} {rates} {min(others) / own:>7.3f}   {worst:.1e}", flush=True)
    return min(others) / own


def throughput(args: argparse.Namespace) -> int:
    """On all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    error = context_parallel_error()
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} gloo ranks, {os.cpu_count()} cores, torch {torch.__version__}")
        print(f"torch's context_parallel here: {error}")
        print(f"{'tokens/s':<14} {'autopar':>10} {'all-gather':>10} {'all-to-all':>10} {'ratio':>7}   losses differ")
    ratios = [compare(name, args) for name in HEADS]
    dist.barrier()
    dist.destroy_process_group()
    return 0 if min(ratios) >= LEAST_RATIO else 1


def memory(args: argparse.Namespace) -> int:
    """Predicted bytes of activations on each of 1 to 8 ranks; a million tokens."""
    model = build_model(HEADS["ring"], args)
    ids = torch.zeros(1, args.tokens, dtype=torch.long)
    call: Any = ((), {"input_ids": ids, "labels": ids})
    print(f"{args.tokens} tokens   ranks   MB of activations a rank   times ranks")
    totals = []
    for ranks in (1, 2, 4, 8):
        pin = {"dp": 1, "cp": ranks, "tp": 1, "zero": 0} if ranks > 1 else {}
        cluster = autopar.ClusterSpec.preset("cpu", gpus=ranks)
        plan = autopar.plan(model, cluster, example_inputs=call, pin={**pin, "recompute": "none"})
        parts = plan.predicted["breakdown"]["memory_bytes"]
        totals.append(ranks * (parts["activations"] + parts["temporaries"]))
        print(f"{'':<14} {ranks:>5} {totals[-1] / ranks / 1e6:>26.2f} {totals[-1] / 1e6:>13.2f}")
    return 0 if million() and all(total <= 1.05 * totals[0] for total in totals) else 1


def million() -> bool:
    """Whether a million tokens fit, and faster than what does without cutting attention's sequence."""
    model, cluster = load_model("llama3-8b"), autopar.ClusterSpec.preset("h100-sxm", gpus=GPUS)
    plan = autopar.plan(model, cluster, seq=MILLION, global_batch=1)
    step_s = plan.predicted["step_time_s"]
    print(f"llama3-8b, {MILLION} tokens, {GPUS} H100: {step_s:.1f} s a step, {plan.layout()}")
    try:
        without_s = autopar.plan(model, cluster, seq=MILLION, global_batch=1, pin={"cp": 1}).predicted["step_time_s"]
    except Infeasible as refused:
        print(f"without cp: {refused}")
        return True
    print(f"without cp: {without_s:.1f} s a step")
    return bool(step_s < without_s)


def main() -> int:
    """Throughput under torchrun, predictions without."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", action="store_true", help="predicted memory, in one process")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=9)
    args = parser.parse_args()
    return memory(args) if args.memory else throughput(args)


if __name__ == "__main__":
    sys.exit(main())
