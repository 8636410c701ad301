"""One rank of tests/test_dropout.py: trains BERT with dropout, alone and by autopar.

    torchrun --nproc-per-node 2 tests/dropout_ranks.py FOLDER

This writes FOLDER/RANK.json: losses, and what the default generator is at after the steps.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import autopar
from autopar.drawing import random_nodes
from autopar.errors import RuntimeFailure
from tests.models import BATCH, ModelAndInputs, next_token_loss

STEPS = 8


def dropout_bert() -> ModelAndInputs:
    """A BERT in float64 with dropout 0.1 in embeddings, attention and hidden layers."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes)).double().train()
        model.loss_function = next_token_loss
        ids = torch.randint(0, 64, (BATCH, 8))
    return model, ((), {"input_ids": ids, "labels": ids})


def losses_of(module: nn.Module, kwargs: dict[str, Any], steps: int, seed: int = 5) -> list[float]:
    """The losses of some steps of AdamW from a seed."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    found = []
    for _ in range(steps):
        loss = module(**kwargs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def train(pin: dict[str, Any]) -> dict[str, Any]:
    """Losses of a program, the first one twice, and the state of the generator."""
    model, (_, kwargs) = dropout_bert()
    program = autopar.compile(copy.deepcopy(model), autopar.ClusterSpec.local(), pin=pin)
    found: dict[str, Any] = {}
    with torch.no_grad():
        torch.manual_seed(5)
        found["again"] = program(**kwargs).loss.item()
        torch.manual_seed(6)
        found["other seed"] = program(**kwargs).loss.item()
    found["losses"] = losses_of(program, kwargs, STEPS)
    found["state"] = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    compiled = program.prepare(((), kwargs))
    decisions = compiled.plan.decisions.nodes
    drawn = [decisions[n] for n in random_nodes(compiled.trace)]
    found["draws in parts"] = sum("draw" in {r.lowering for r in d.rules} for d in drawn)
    found["eager"] = losses_of(model, kwargs, STEPS)
    return found


def refused() -> str:
    """What is said where ranks were seeded differently."""
    model, (_, kwargs) = dropout_bert()
    torch.manual_seed(dist.get_rank())
    try:
        autopar.compile(model, autopar.ClusterSpec.local(), pin={"dp": 2})(**kwargs)
    except RuntimeFailure as error:
        return str(error)
    return "not refused"


def main() -> None:
    """Data parallel (parts), and a plan in which nothing is cut (whole)."""
    torch.set_num_threads(1)
    facts: dict[str, Any] = {"cut": train({"dp": 2}), "whole": train({"mesh": [2]})}
    assert facts["whole"]["draws in parts"] == 0, "on this cluster cutting a tiny model does not pay"
    facts["refused"] = refused()
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
