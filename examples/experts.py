"""Trains a small mixture of experts on four processes, experts spread over them, and compares with one device.

    torchrun --standalone --nproc-per-node 4 examples/experts.py            # two times two: experts, and data
    torchrun --standalone --nproc-per-node 4 examples/experts.py --ep 4     # experts over all ranks

The model is Mixtral from transformers, unmodified; its experts run as one grouped product. Every rank passes the whole
batch, works on its own tokens, sends them to the ranks that hold their experts, and gets the results back: as many as
the router says, none dropped. The last line is the largest relative difference of losses and parameters from the same
model trained on one device, in float64.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import MixtralConfig, MixtralForCausalLM

import autopar

STEPS, BATCH, SEQ, VOCAB = 3, 8, 16, 64


def build_model() -> nn.Module:
    """Two layers with eight experts each, two of them for every token."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, output_router_logits=True, use_cache=False,
        max_position_embeddings=64,
    )  # fmt: skip
    return MixtralForCausalLM(config).double()


def with_experts(model: nn.Module, implementation: str) -> nn.Module:
    """A copy of the model whose experts run in one way or the other."""
    made = copy.deepcopy(model)
    made.config._experts_implementation = implementation  # type: ignore[union-attr]
    return made


def train(model: nn.Module) -> list[float]:
    """Losses of a few steps of plain SGD, each on another batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(VOCAB, (BATCH, SEQ), generator=generator)
        loss = model(input_ids=ids, labels=ids)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def difference(program: nn.Module, reference: nn.Module) -> float:
    """The largest difference of any parameter, relative to its largest number."""
    worst = 0.0
    expected = dict(reference.named_parameters())
    for name, param in program.named_parameters():
        whole = (param.full_tensor() if isinstance(param, DTensor) else param).detach()
        worst = max(worst, float((whole - expected[name]).abs().max() / expected[name].detach().abs().max()))
    return worst


def main() -> None:
    """Train both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=2, help="ranks over which experts are spread")
    parser.add_argument("--dispatch", choices=("exchange", "local"), default="exchange")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, cluster = build_model(), autopar.ClusterSpec.local()
    reference = with_experts(model, "batched_mm")  # a product per token: what a single device can run in float64
    pin = {"ep": args.ep, "expert_dispatch": args.dispatch}
    program = autopar.compile(with_experts(model, "grouped_mm"), cluster, pin=pin, time_limit_s=20)
    mine, theirs = train(program), train(reference)
    worst = max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))
    worst = max(worst, difference(program, reference))
    if dist.get_rank() == 0:
        plan = program.plan
        assert plan is not None
        mesh = "x".join(map(str, plan.mesh))
        print(f"mesh {mesh}, experts over {plan.layout_keys['ep']} ranks; losses {[round(x, 6) for x in mine]}")
        print(f"largest difference from one device: {worst:.1e}")
    dist.barrier()  # by then torch's threads have let go of tensors, which they must not do while Python ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
