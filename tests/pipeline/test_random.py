"""Any legal combination: random placements of every op on a stage's mesh (data, tensor, sequence, experts, sharded
parameters, recomputation), random stages, schedule and micro-batches, against the single device on the whole batch."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from autopar.cluster import ClusterSpec
from autopar.codegen.stage_nodes import StageNodes, stages_by_blocks
from autopar.codegen.stages import emit_stages
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.errors import AutoparError
from autopar.sharding import build_problem
from autopar.simulating.schedules import schedule_orders
from autopar.trace import Trace, trace
from autopar.verifying.pipeline import verify_pipeline
from autopar.verifying.pipeline_case import staged_case
from tests.pipeline.random_models import random_blocks
from tests.random_plans import RECOMPUTE_AND_COPIES, random_decisions

MESHES: tuple[tuple[int, ...], ...] = ((), (2,), (4,), (2, 2))
CASES_PER_MODEL = 12  # three of each mesh
MODELS_IN_TEST, MODELS_IN_ALL = 25, 417  # x 12: 300 and 5,004 cases


def random_schedule(rng: random.Random, micro_batches: int) -> tuple[str, int, int]:
    """(schedule, pipeline ranks, chunks a rank)."""
    schedule = rng.choice(("gpipe", "1f1b", "zero-bubble", "interleaved"))
    if schedule == "interleaved" and micro_batches % 2 == 0:
        return schedule, 2, 2
    return ("1f1b" if schedule == "interleaved" else schedule), rng.choice((1, 2, 3, 4)), 1


def random_stages(rng: random.Random, traced: Trace, blocks: int, stages: int) -> StageNodes:
    """Blocks dealt to stages in turn, some of which may get none."""
    bounds = sorted(rng.randint(0, blocks) for _ in range(stages - 1))
    return stages_by_blocks(traced, [b - a for a, b in zip([0, *bounds], [*bounds, blocks], strict=True)])


def first(call: Any, size: int) -> Any:
    """The call with the first `size` rows."""
    return call[0], {name: tensor[:size] for name, tensor in call[1].items()}


def check_model(seed: int, cases: int = CASES_PER_MODEL) -> int:
    """Random combinations of one random model; returns how many were compared."""
    rng = random.Random(seed)
    blocks, size, count = rng.choice((2, 3)), 4, rng.choice((1, 2, 2, 4))
    model, call = random_blocks(seed, blocks, size * count)
    larger = trace(model, call)
    traced = larger if count == 1 else trace(model, first(call, size))
    on = {mesh: CostModel(ClusterSpec.preset("h100-sxm", gpus=math.prod(mesh)), mesh) for mesh in MESHES}
    problems = {mesh: build_problem(traced, costs, OptimizerSpec("adamw")) for mesh, costs in on.items()}
    for case in range(cases):
        mesh = MESHES[case % len(MESHES)]
        costs, stated = on[mesh], problems[mesh]
        recompute, copies = rng.choice(RECOMPUTE_AND_COPIES)
        decisions = random_decisions(traced, stated, rng, recompute=recompute, keep_copies=copies)
        schedule, ranks, chunks = random_schedule(rng, count)
        stages = random_stages(rng, traced, blocks, ranks * chunks)
        try:
            program = emit_stages(traced, decisions, mesh, costs, stages, reduce_each=rng.random() < 0.3)
            one = staged_case(model, call, larger, traced, decisions, program, seed=seed)
            report = verify_pipeline(one, schedule_orders(schedule, ranks, count, chunks))
        except AutoparError as error:
            what = f"model {seed}, case {case}: {schedule} of {ranks} x {chunks} on {mesh}"
            raise AssertionError(f"{what}: {error}") from error
        assert report.tolerance == 1e-9
    return cases


@pytest.mark.parametrize("seed", range(MODELS_IN_TEST))
def test_random_combinations_compute_the_same(seed: int) -> None:
    assert check_model(seed) == CASES_PER_MODEL


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(MODELS_IN_TEST, MODELS_IN_ALL))
def test_many_random_combinations_compute_the_same(seed: int) -> None:
    assert check_model(seed) == CASES_PER_MODEL
