"""Trains a small Llama in pipeline stages, each on ranks of its own, and says how far it is from one device.

    torchrun --standalone --nproc-per-node 4 examples/pipeline.py
    torchrun --standalone --nproc-per-node 4 examples/pipeline.py --pin pp=4 --pin schedule=gpipe

Every rank passes the whole batch. Needs no GPU.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar.command_line import parse_pin
from autopar.runtime.memory import measure_peak

STEPS, BATCH, SEQ, VOCAB = 5, 8, 32, 256
PINS = {"pp": 2, "tp": 2, "micro_batch": 2, "schedule": "zero-bubble"}
TOLERANCE = 1e-3  # float32: Adam divides by the size of gradients, so that rounding in tiny ones grows


def build_model() -> nn.Module:
    """A Llama of 4 layers with seeded weights and tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def batches() -> list[dict[str, torch.Tensor]]:
    """Random tokens, the same on every rank; some rows end early, so that micro-batches count unequally many."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCAB, (BATCH, SEQ), generator=generator)
        labels = tokens.clone()
        labels[::3, SEQ // 2 :] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


def train_single(model: nn.Module) -> list[float]:
    """The losses of the model as it is, on one device."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for batch in batches():
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_stages(program: autopar.Program, optimizer: torch.optim.Optimizer) -> list[float]:
    """The same with stages: `train_step` for the call and its backward pass, the norm of gradients over all stages."""
    losses = []
    for batch in batches():
        loss = program.train_step(**batch)
        program.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def largest_difference(program: nn.Module, model: nn.Module) -> float:
    """Of the parameters that this rank's stage stores, relative to the largest element of each."""
    expected = {name: param.detach() for name, param in model.named_parameters()}
    worst = 0.0
    for name, param in program.named_parameters():
        assert isinstance(param, DTensor)
        if param.device_mesh.get_coordinate() is not None:
            whole = param.full_tensor().detach()
            worst = max(worst, float((whole - expected[name]).abs().max() / expected[name].abs().max()))
    return worst


def memory(program: autopar.Program, optimizer: torch.optim.Optimizer) -> list[tuple[int, int]]:
    """Peak bytes of tensors, predicted and measured, of the first rank of each stage."""
    batch = batches()[0]
    measured = measure_peak(lambda: program.train_step(**batch), program, optimizer, *batch.values())
    optimizer.zero_grad()
    of_ranks = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    of_ranks[dist.get_rank()] = measured - 4 * len(optimizer.state)  # Adam's counters of steps: no plan predicts them
    dist.all_reduce(of_ranks)
    predicted = program.peak_bytes_per_stage()
    return list(zip(predicted, of_ranks[:: len(of_ranks) // len(predicted)].tolist(), strict=True))


def main() -> None:
    """Train both ways and compare; the exit code says whether they agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pin", type=parse_pin, action="append", default=[], help="as in autopar plan --pin")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model()
    program = autopar.compile(
        copy.deepcopy(model), autopar.ClusterSpec.local(), pin=dict(args.pin) if args.pin else PINS
    )
    optimizer = torch.optim.AdamW(program.parameters(), lr=1e-3)
    found, expected = train_stages(program, optimizer), train_single(model)
    rank = torch.tensor([max(abs(a - b) / b for a, b in zip(found, expected, strict=True)),
                         largest_difference(program, model)])  # fmt: skip
    dist.all_reduce(rank, dist.ReduceOp.MAX)
    losses, params = rank.tolist()
    stages = memory(program, optimizer)
    if dist.get_rank() == 0:
        plan = program.plan
        assert plan is not None
        print(f"layout: {plan.layout()}")
        print(f"loss {found[0]:.4f} -> {found[-1]:.4f}, on one device {expected[0]:.4f} -> {expected[-1]:.4f}")
        for number, (predicted, measured) in enumerate(stages):
            more = predicted / measured - 1
            print(f"stage {number}: {predicted / 1e6:.3f} MB predicted, {measured / 1e6:.3f} MB measured ({more:+.1%})")
        print(f"largest difference from one device: losses {losses:.1e}, parameters {params:.1e}")
    dist.barrier()  # by then torch's threads have let go of tensors, which they must not do while Python ends
    dist.destroy_process_group()
    if max(losses, params) > TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
