"""Cuts the products of a small Llama by several mesh axes at once, and compares with one device.

    torchrun --standalone --nproc-per-node 4 examples/tensor_dims.py              # 2 x 2
    torchrun --standalone --nproc-per-node 8 examples/tensor_dims.py --tp 2 2 2

Every axis cuts every weight, each its own way: rows, columns, or what is summed over. The last line is the largest
relative difference of losses and parameters from the same model trained on one device, in float64.
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

STEPS, BATCH, SEQ, VOCAB = 3, 4, 16, 64


class WithLoss(nn.Module):
    """A causal language model with a loss in float64 (that of transformers is computed in float32)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [batch, sequence]."""
        logits = self.model(input_ids=ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))


def build_model() -> nn.Module:
    """Two layers, seeded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return WithLoss(LlamaForCausalLM(config)).double()


def train(model: nn.Module) -> list[float]:
    """Losses of a few steps of plain SGD, each on another batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        loss = model(torch.randint(VOCAB, (BATCH, SEQ), generator=generator))
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
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        worst = max(worst, float((whole - expected[name]).abs().max() / expected[name].abs().max()))
    return worst


def main() -> None:
    """Train both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 2], help="sizes of the axes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reference, cluster = build_model(), autopar.ClusterSpec.local()
    program = autopar.compile(copy.deepcopy(reference), cluster, pin={"tp": args.tp}, time_limit_s=20)
    mine, theirs = train(program), train(reference)
    worst = max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))
    worst = max(worst, difference(program, reference))
    if dist.get_rank() == 0:
        plan = program.plan
        assert plan is not None
        name, state = next((n, s) for n, s in plan.decisions.params.items() if "up_proj" in n)
        print(f"mesh {'x'.join(map(str, plan.mesh))}: {', '.join(plan.roles)}; {name} is stored as {', '.join(state)}")
        print(f"largest difference from one device: {worst:.1e}")
    dist.barrier()  # by then torch's threads have let go of tensors, which they must not do while Python ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
