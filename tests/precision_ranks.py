"""One rank of tests/test_precision.py: trains BERT in bf16, under autocast alone and by autopar.

    torchrun --nproc-per-node 2 tests/precision_ranks.py FOLDER

This writes FOLDER/RANK.json: relative differences, and the dtypes of what is stored.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import autopar
from autopar.verification import gradient_errors, relative_error
from tests.models import tiny_bert

STEPS = 4


def whole(tensor: Any) -> torch.Tensor:
    """The whole of a gradient."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(pin: dict[str, Any]) -> dict[str, Any]:
    """Some steps of AdamW on both sides."""
    model, (_, kwargs) = tiny_bert(torch.float32, layers=1)
    program = autopar.compile(copy.deepcopy(model), autopar.ClusterSpec.local(), pin=pin, precision="bf16")
    mine, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (program, model))
    found: dict[str, Any] = {"loss": []}
    for step in range(STEPS):
        loss = program(**kwargs)["loss"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = model(**kwargs)["loss"]
        loss.backward()
        expected.backward()
        found["loss"].append(relative_error(loss.detach(), expected.detach()))
        if step == 0:
            grads = [{n: whole(p.grad) for n, p in m.named_parameters()} for m in (program, model)]
            found["gradient"] = max(gradient_errors(*grads).values())
            stored = [*program.parameters(), *(p.grad for p in program.parameters())]
        mine.step()
        theirs.step()
        stored += [t for state in mine.state.values() for key, t in state.items() if key != "step"]
        mine.zero_grad()
        theirs.zero_grad()
    found["dtypes"] = sorted({str(t.dtype) for t in stored})
    found["cut"] = sum(not all(p.is_replicate() for p in t.placements) for t in program.parameters())
    return found


def main() -> None:
    """Fully sharded data parallel, and tensor parallel."""
    torch.set_num_threads(1)
    facts = {"zero3": train({"dp": 2, "zero": 3}), "tp": train({"tp": 2})}
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
