"""One rank of tests/test_outputs.py: trains a model that returns tensors, with a loss made outside.

    torchrun --nproc-per-node 2 tests/outputs_ranks.py FOLDER

This writes FOLDER/RANK.json: the largest relative differences from the same script on one device.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.verification import gradient_errors, relative_error
from tests.models import BATCH, HIDDEN, ModelAndInputs

CLASSES = 16


class Heads(nn.Module):
    """Two layers, and a nested result: tensors with and without gradient, one of them twice, and constants."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 128)
        self.down = nn.Linear(128, CLASSES)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, HIDDEN))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        """x: [batch, width]."""
        hidden = torch.nn.functional.gelu(self.up(x * self.scale))
        logits = self.down(hidden)
        more = ({"hidden": hidden}, [hidden.mean(), None])
        return {
            "logits": logits, "more": more, "twice": logits.clone(), "classes": logits.argmax(-1),
            "scale": self.scale * 2, "name": "heads",
        }  # fmt: skip


def heads() -> ModelAndInputs:
    """`Heads` in float64 with its input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Heads().double(), ((torch.randn(BATCH, HIDDEN, dtype=torch.float64),), {})


def criterion(out: dict[str, Any]) -> torch.Tensor:
    """A loss of most of what `Heads` returns."""
    target = torch.arange(BATCH) % CLASSES
    loss = nn.functional.cross_entropy(out["logits"] * out["scale"].mean(), target)
    penalty = out["more"][0]["hidden"].pow(2).mean() + (out["twice"] - out["logits"].detach()).sum()
    return loss + 0.1 * penalty + out["more"][1][0]


def main() -> None:
    """Three steps of AdamW on both sides, then evaluation."""
    torch.set_num_threads(1)
    model, call = heads()
    program = autopar.compile(copy.deepcopy(model), autopar.ClusterSpec.local(), pin={"tp": 2})
    facts: dict[str, float] = {}
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (program, model)]
    for step in range(3):
        losses = [criterion(m(*call[0])) for m in (program, model)]
        for loss in losses:
            loss.backward()
        grads = [{n: whole(p.grad) for n, p in m.named_parameters()} for m in (program, model)]
        facts[f"loss {step}"] = relative_error(losses[0].detach(), losses[1].detach())
        facts[f"gradient {step}"] = max(gradient_errors(*grads).values())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        found, expected = program.eval()(*call[0]), model.eval()(*call[0])
    assert type(found["logits"]) is torch.Tensor and torch.equal(found["classes"], expected["classes"])
    facts["evaluation"] = relative_error(found["logits"], expected["logits"])
    facts["cut"] = sum(not all(p.is_replicate() for p in t.placements) for t in program.parameters())
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


def whole(tensor: Any) -> torch.Tensor:
    """The whole of a gradient, if it is cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main()
