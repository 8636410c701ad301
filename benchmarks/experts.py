"""Throughput of a mixture-of-experts layer, experts spread over gloo ranks: a program beside a layer written by hand.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 4 benchmarks/experts.py

Both do one step, forward and backward, of Mixtral's layer (8 experts, 2 for a token) and the norm before it, on the
same batch in float32. By hand: counts, an all-to-all each way by torch.distributed.nn (with gradients), a product per
expert, the gradients of router and norm summed. The two take turns, and take turns at being first, so that a busy
machine is busy for both, and the ratio is the median of those of the rounds, beside it their middle half. The last line
says how far apart the losses are. Exits with 1 where the program has less than the throughput of the layer by hand, or
another loss.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, too

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_to_all_single
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import autopar
from benchmarks.throughput import Ratio, Variant, timed

_TOLERANCE = 1e-5  # of losses in float32


class Layer(nn.Module):
    """Mixtral's layer, and a loss."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.block = MixtralSparseMoeBlock(config)
        for param in self.parameters():
            nn.init.normal_(param, std=0.02)
        self.norm = nn.RMSNorm(config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, sequence, hidden]."""
        return self.block(self.norm(x)).square().mean()  # type: ignore[no-any-return]


class ByHand(nn.Module):
    """The same on a rank's own tokens and experts. gate, up_down: the weights of `Layer`."""

    def __init__(self, layer: Layer, rank: int, ranks: int) -> None:
        super().__init__()
        block, mine = layer.block, slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        self.ranks, self.top = ranks, 2
        self.norm = copy.deepcopy(layer.norm)
        self.gate = nn.Parameter(block.gate.weight.detach().clone())
        self.gate_up = nn.Parameter(block.experts.gate_up_proj.detach()[mine].clone())
        self.down = nn.Parameter(block.experts.down_proj.detach()[mine].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens of this rank, hidden]; this rank's part of the mean square over all ranks."""
        x = self.norm(x)
        weights, chosen = torch.topk(torch.softmax(x @ self.gate.T, -1), self.top)
        weights = weights / weights.sum(-1, keepdim=True)
        order = torch.argsort(chosen.view(-1), stable=True)
        sent = torch.bincount(chosen.view(-1), minlength=8).view(self.ranks, -1)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent)
        out_sizes, in_sizes = got.sum(1).tolist(), sent.sum(1).tolist()
        rows = self._move(x[order // self.top], out_sizes, in_sizes)
        groups = torch.arange(got.shape[1]).repeat(self.ranks).repeat_interleave(got.view(-1))
        made = rows.new_zeros(rows.shape)
        for expert in range(got.shape[1]):
            here = (groups == expert).nonzero().view(-1)
            gate, up = (rows[here] @ self.gate_up[expert].T).chunk(2, -1)
            made = made.index_add(0, here, (nn.functional.silu(gate) * up) @ self.down[expert].T)
        back = self._move(made, in_sizes, out_sizes) * weights.view(-1)[order, None]
        total = torch.zeros_like(x).index_add(0, order // self.top, back)
        return total.square().sum() / (total.numel() * self.ranks)

    def _move(self, rows: torch.Tensor, out_sizes: list[int], in_sizes: list[int]) -> torch.Tensor:
        room = rows.new_empty(sum(out_sizes), rows.shape[1])
        moved: torch.Tensor = all_to_all_single(room, rows.contiguous(), out_sizes, in_sizes)
        return moved


def main() -> None:
    """Measure both, by turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=args.hidden, intermediate_size=2 * args.hidden, num_local_experts=8, num_experts_per_tok=2,
        experts_implementation="grouped_mm",
    )  # fmt: skip
    layer, x = Layer(config), torch.randn(8, 256, args.hidden)
    cluster = autopar.ClusterSpec.local()
    pin = {"ep": cluster.devices, "expert_dispatch": "exchange"}
    program = autopar.compile(copy.deepcopy(layer), cluster, pin=pin)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    hand, own = ByHand(layer, rank, ranks), x.view(-1, args.hidden).chunk(ranks)[rank].contiguous()

    def by_program() -> torch.Tensor:
        loss: torch.Tensor = program(x)
        loss.backward()
        program.zero_grad()
        return loss.detach()

    def by_hand() -> torch.Tensor:
        loss: torch.Tensor = hand(own)
        loss.backward()
        for param in (hand.gate, hand.norm.weight):
            assert param.grad is not None
            dist.all_reduce(param.grad)
        hand.zero_grad()
        return loss.detach()

    total = by_hand()
    dist.all_reduce(total)
    apart = abs(float(by_program()) - float(total)) / float(total)
    taken = timed([Variant("program", by_program, ()), Variant("by hand", by_hand, ())], args.rounds)
    ratio = Ratio.of(taken["program"], taken["by hand"])
    mine, theirs = (x.shape[0] / statistics.median(seconds) for seconds in taken.values())
    if rank == 0:
        print(
            f"{ranks} ranks, {x.shape[0] * x.shape[1]} tokens of {args.hidden}: program {mine:.2f}, by hand "
            f"{theirs:.2f} samples/s: {ratio.median:.3f} times ({ratio.low:.3f} to {ratio.high:.3f})"
        )
        print(f"losses are {apart:.1e} apart")
    verdict = torch.tensor([float(ratio.median < 1 or apart > _TOLERANCE)])
    dist.broadcast(verdict, 0)  # ranks time apart, and end alike
    dist.destroy_process_group()
    sys.exit(int(verdict.item()))


if __name__ == "__main__":
    main()
