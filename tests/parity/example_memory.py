"""What a rank of an example holds at its peak, by torch's tracker, beside what the plan says.

Run under torchrun: example_memory.py experts|long_sequence; every rank says "peak MEASURED PREDICTED" (bytes).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import autopar
from examples import experts as experts_example
from examples import long_sequence as long_sequence_example
from tests.peaks import peak_of_training

Case = tuple[nn.Module, dict[str, torch.Tensor], dict[str, Any]]


def experts(ranks: int) -> Case:
    """Experts over all ranks."""
    ids = torch.randint(
        experts_example.VOCAB, (experts_example.BATCH, experts_example.SEQ), generator=torch.Generator().manual_seed(0)
    )
    model = experts_example.with_experts(experts_example.build_model(), "grouped_mm")
    return model, {"input_ids": ids, "labels": ids.clone()}, {"ep": ranks, "expert_dispatch": "exchange"}


def long_sequence(ranks: int) -> Case:
    """A ring of all ranks."""
    model, batch = long_sequence_example.model_and_batch(2048)
    return model, batch, {"dp": 1, "cp": ranks, "tp": 1}


def main() -> None:
    """One step to make the optimizer's state, one under the tracker."""
    torch.set_num_threads(1)
    cluster = autopar.ClusterSpec.local()
    model, batch, pin = {"experts": experts, "long_sequence": long_sequence}[sys.argv[1]](cluster.devices)
    program = autopar.compile(model, cluster, pin=pin, time_limit_s=20)
    program.prepare(((), batch))
    measured = peak_of_training(program, batch)
    assert program.plan is not None
    sys.stdout.write(f"peak {measured} {program.plan.predicted['peak_bytes']}\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
