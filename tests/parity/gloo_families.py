"""One rank of tests/parity/test_gloo.py: trains models of other families, alone and by autopar, and compares.

    torchrun --nproc-per-node 4 tests/parity/gloo_families.py FOLDER FAMILY...

Writes FOLDER/RANK.json: per family, largest relative differences of loss, gradients, parameters, updated buffers.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import autopar
import autopar.api
from autopar.api import trace
from autopar.verification import gradient_errors, relative_error
from tests.families import FAMILIES
from tests.parity.gloo_ranks import Facts, full, parameter_error, placements, step
from tests.parity.simulate import STEPS, adamw
from tests.widen import WidenCasts, widened

PINS: dict[str, dict[str, Any]] = {
    "resnet": {"dp": 4},
    "unet": {
        "mesh": [2, 2],
        "down2.conv1.weight": ("R", "S(0)"),
        "double2.weight": ("S(1)", "R"),
        "attention.qkv.weight": ("S(0)", "S(0)"),
    },
    "t5": {"dp": 2, "tp": 2},
    "mixtral": {"tp": 4},
}


def trained_both(name: str) -> Facts:
    """Five AdamW steps on each side."""
    model, inputs = FAMILIES[name]()
    cluster = autopar.ClusterSpec.local()
    program = autopar.compile(copy.deepcopy(model), cluster, pin=PINS[name], time_limit_s=10.0)
    mine, theirs = (adamw(m.parameters()) for m in (program, model))
    facts: Facts = {"loss": 0.0, "gradient": 0.0}
    for _ in range(STEPS):
        found = step(program, mine, inputs)
        with WidenCasts():
            expected = step(model, theirs, inputs)
        assert found["grads"].keys() == expected["grads"].keys()
        facts["loss"] = max(facts["loss"], relative_error(found["loss"], expected["loss"]))
        facts["gradient"] = max(facts["gradient"], *gradient_errors(found["grads"], expected["grads"]).values())
    facts["parameter"] = parameter_error(program, model)
    buffers = dict(program.named_buffers())
    facts["buffer"] = max((relative_error(full(buffers[n]), b) for n, b in model.named_buffers()), default=0.0)
    facts["buffers"] = sum(b.numel() for b in buffers.values())
    facts["cut"] = sum(not p.is_replicated for p in placements(program))
    return facts


def main() -> None:
    """Run the families one after the other and write what was found."""
    torch.set_num_threads(1)
    autopar.api.trace = lambda model, call: widened(trace(model, call))  # type: ignore[assignment]
    facts = {name: trained_both(name) for name in sys.argv[2:]}
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
