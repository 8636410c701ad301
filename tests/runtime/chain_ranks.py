"""One rank of tests/runtime/test_rank_pipeline.py: runs the chain of `chain.py` under every schedule.

chain_ranks.py FOLDER: writes FOLDER/RANK.json: per schedule, the largest difference from one device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from autopar.runtime.rank_pipeline import Place, RankPipeline
from autopar.simulating.schedules import schedule_orders
from tests.runtime.chain import ROWS, WIDTH, chain, expected_loss

WEIGHTS = [0.5, 0.125, 0.25, 1.0, 0.75, 2.0]
STEPS = 2
CASES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero-bubble": 1}  # chunks a rank


def difference(schedule: str, chunks: int) -> float:
    """Of loss and all gradients that are here, over a few steps."""
    ranks = dist.get_world_size()
    program, orders = chain(ranks * chunks), schedule_orders(schedule, ranks, len(WEIGHTS), chunks)
    place = Place(dist.group.WORLD, (), (), torch.device("cpu"))  # type: ignore[arg-type]
    pipeline = RankPipeline(program, orders, {name: name for name in program.owners}, place)
    worst = 0.0
    for number in range(STEPS):
        torch.manual_seed(number)
        values = {name: torch.randn(WIDTH, dtype=torch.float64, requires_grad=True) for name in program.owners}
        x = torch.randn(len(WEIGHTS) * ROWS, WIDTH, dtype=torch.float64)
        loss = expected_loss(values, x, WEIGHTS)
        loss.backward()
        weights = [torch.tensor(w, dtype=torch.float64) for w in WEIGHTS]
        batches = [{"x": p, "t": w} for p, w in zip(x.chunk(len(WEIGHTS)), weights, strict=True)]
        grads = pipeline.step({n: v.detach() for n, v in values.items() if pipeline.owns(n)}, batches)
        assert grads.keys() == {n for n in values if pipeline.owns(n)}
        losses = pipeline.results("loss", weights[0])
        found = sum(w * one for w, one in zip(WEIGHTS, losses, strict=True))
        worst = max(worst, float((found - loss).abs()))
        worst = max([worst, *(float((g - values[n].grad).abs().max()) for n, g in grads.items())])
    return worst


def main() -> None:
    """Run all schedules."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = {schedule: difference(schedule, chunks) for schedule, chunks in CASES.items()}
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
