"""What a rank of `examples/experts.py` holds at its peak, by torch's tracker, beside what the plan says.

Run under torchrun; every rank says "peak MEASURED PREDICTED" (bytes).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import autopar
from tests.peaks import peak_of_training

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "experts.py"


def main() -> None:
    """One step to make the optimizer's state, one under the tracker."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.set_num_threads(1)
    model, cluster = example.with_experts(example.build_model(), "grouped_mm"), autopar.ClusterSpec.local()
    pin = {"ep": cluster.devices, "expert_dispatch": "exchange"}
    program = autopar.compile(model, cluster, pin=pin, time_limit_s=20)
    ids = torch.randint(example.VOCAB, (example.BATCH, example.SEQ), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.clone()}
    program.prepare(((), batch))
    measured = peak_of_training(program, batch)
    assert program.plan is not None
    sys.stdout.write(f"peak {measured} {program.plan.predicted['peak_bytes']}\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
