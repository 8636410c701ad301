"""One rank of tests/runtime/test_stage_memory.py: trains the model of examples/pipeline.py under the memory tracker.

memory_ranks.py FOLDER LAYOUT ...: writes FOLDER/RANK.json: per layout, measured and predicted bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import autopar
from autopar.runtime.memory import measure_peak
from examples.pipeline import PINS, batches, build_model

LAYOUTS: dict[str, dict[str, Any]] = {
    "the example's": PINS,
    "gpipe": {"pp": 4, "micro_batch": 1, "schedule": "gpipe"},
    "1f1b": {"pp": 4, "micro_batch": 1, "schedule": "1f1b"},
    "interleaved": {"pp": 2, "vpp": 2, "dp": 2, "micro_batch": 1, "schedule": "interleaved", "zero": 1},
}


def measured_and_predicted(pin: dict[str, Any]) -> tuple[int, int]:
    """Peak bytes of a step on this rank."""
    program = autopar.compile(build_model(), autopar.ClusterSpec.local(), pin=pin)
    batch = batches()[0]
    program.train_step(**batch)
    optimizer = torch.optim.AdamW(program.parameters())
    optimizer.step()
    optimizer.zero_grad()
    counters = 4 * len(optimizer.state)  # Adam counts its steps in one float32 a tensor, which no plan predicts
    found = measure_peak(lambda: program.train_step(**batch), program, optimizer, *batch.values()) - counters
    return found, program.peak_bytes_per_stage()[dist.get_rank() * pin["pp"] // dist.get_world_size()]


def main() -> None:
    """Run all layouts."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {}
    for name in sys.argv[2:]:
        found[name] = measured_and_predicted(LAYOUTS[name])
        (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
