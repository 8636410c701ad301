"""Trains a small Llama on English text: on one device, or by autopar on what torchrun started.

    python examples/train_llama.py
    torchrun --standalone --nproc-per-node 4 examples/train_llama.py --memory-limit-mb 30

The model has the shape of Llama and a vocabulary of bytes; the text is the documentation of
Python's own language topics. The training loop is the same in both cases: every rank passes
the whole batch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar.command_line import parse_pin
from autopar.runtime.memory import measure_peak

MEASURED_STEP = 2  # gradients and optimizer state exist from the second step on


def build_model(seed: int = 0) -> nn.Module:
    """A Llama of 4 layers, 1 million parameters, with seeded weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        use_cache=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def batches(steps: int, batch: int, seq: int, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Random windows of the text, as bytes: input_ids and labels [batch, seq]."""
    text = "\n".join(topics[name] for name in sorted(topics)).encode("utf-8")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(data) - seq, (batch,), generator=generator)
        tokens = torch.stack([data[start : start + seq] for start in starts])
        yield {"input_ids": tokens, "labels": tokens.clone()}


def train(model: nn.Module, args: argparse.Namespace) -> dict[str, Any]:
    """The loop that both cases share. Returns losses, seconds per step, and the measured peak bytes of a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, foreach=False)
    losses: list[float] = []
    seconds: list[float] = []
    peak_bytes = 0

    def step(batch: dict[str, torch.Tensor]) -> None:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    for number, batch in enumerate(batches(args.steps, args.batch, args.seq)):
        start = time.perf_counter()
        if number == MEASURED_STEP:
            peak_bytes = measure_peak(partial(step, batch), model, optimizer, *batch.values())
        else:
            step(batch)
            seconds.append(time.perf_counter() - start)
    return {"losses": losses, "step_s": sorted(seconds)[len(seconds) // 2], "peak_bytes": peak_bytes}


def train_single(args: argparse.Namespace) -> dict[str, Any]:
    """The model as it is, on one device."""
    return train(build_model(), args)


def train_parallel(args: argparse.Namespace) -> dict[str, Any]:
    """The same model compiled for what torchrun started. Peaks are of the worst rank."""
    cluster = autopar.ClusterSpec.local()
    example = next(batches(1, args.batch, args.seq))
    limit_bytes = None if args.memory_limit_mb is None else int(args.memory_limit_mb * 10**6)
    start = time.perf_counter()
    program = autopar.compile(
        build_model(),
        cluster,
        example_inputs=((), example),
        memory_limit_bytes=limit_bytes,
        time_limit_s=args.time_limit_s,
        pin=dict(args.pin),
    )
    plan = program.plan
    assert plan is not None  # example_inputs were given
    compile_s = time.perf_counter() - start
    if dist.get_rank() == 0:
        print(replace(program.explain(), solves=False))  # without what else could be, which takes a minute to solve
    result = train(program, args)
    peaks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, result["peak_bytes"])
    dist.barrier()  # by then torch's threads have let go of tensors, which they must not do while Python ends
    dist.destroy_process_group()
    return {
        **result,
        "peak_bytes": max(peaks),
        "predicted_peak_bytes": plan.to_summary()["peak_bytes"],
        "layout": plan.layout(),
        "compile_s": compile_s,
    }


def main() -> None:
    """Train and, on the first rank, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16, help="samples in a step, over all ranks")
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--memory-limit-mb", type=float, help="per rank, in 10^6 bytes")
    parser.add_argument("--time-limit-s", type=float, default=20.0, help="of the search for a plan")
    parser.add_argument("--pin", type=parse_pin, action="append", default=[], help="as in autopar plan --pin")
    parser.add_argument("--out", type=Path, help="write losses and figures to this JSON file")
    args = parser.parse_args()
    result = train_parallel(args) if dist.is_torchelastic_launched() else train_single(args)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"loss {result['losses'][0]:.3f} -> {result['losses'][-1]:.3f}, {result['step_s'] * 1e3:.0f} ms a step")
        if args.out is not None:
            args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
