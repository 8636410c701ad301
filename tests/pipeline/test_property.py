"""Wherever a random program is cut, its pipeline computes the model's loss and gradients.

Plans are random as in `tests/test_property.py`. Unlike in `test_random.py` stages begin at random ops, and some ops, of
the backward pass too, wish for a stage of their own: values then cross several stages, both ways.
"""

from __future__ import annotations

import random

import pytest

from autopar.cluster import ClusterSpec
from autopar.codegen.stage_nodes import StageNodes, stages_near
from autopar.codegen.stages import emit_stages
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.dataflow import is_backward
from autopar.errors import AutoparError
from autopar.sample import sample_values
from autopar.sharding import build_problem
from autopar.simulating.schedules import schedule_orders
from autopar.trace import Trace, trace
from autopar.verifying.pipeline import verify_pipeline
from autopar.verifying.pipeline_case import case_of_batches
from tests.graphs import random_model
from tests.random_plans import RECOMPUTE_AND_COPIES, random_decisions

MESHES = ((), (2,), (2, 2))
CASES_PER_MESH = 2
MODELS_IN_TEST, MODELS_IN_ALL = 2, 120  # x 6 cases
MICRO_BATCHES = 2


def random_stages(traced: Trace, count: int, rng: random.Random) -> StageNodes:
    """Stages that begin at random ops of the forward pass, with exceptions."""
    ops = [n for n in traced.graph_module.graph.nodes if n.op == "call_function"]
    forward = [n for n in ops if not is_backward(n)]
    begins = sorted(rng.sample(range(1, len(forward)), count - 1))
    wanted = {n.name: sum(at >= b for b in begins) for at, n in enumerate(forward)}
    some = rng.choice((0.0, 0.1, 0.5))
    wishes: dict[str, int | None] = {}
    for node in ops:
        wish = rng.randrange(count) if rng.random() < some else wanted.get(node.name)
        wishes[node.name] = None if rng.random() < 0.3 else wish
    return stages_near(traced, wishes, count)


def check_model(seed: int) -> int:
    """Random pipelines of one random model on every mesh; returns how many were compared."""
    model, call = random_model(seed)
    traced = trace(model, call)
    values = sample_values(traced, model, call, seed)
    inputs = [i.node for i in traced.inputs]
    other = sample_values(traced, model, random_model(seed + 1000)[1], seed)
    batches = [values, {**values, **{name: other[name] for name in inputs}}]
    rng = random.Random(seed)
    cases = 0
    for mesh in MESHES:
        ranks = 2 ** len(mesh)
        costs = CostModel(ClusterSpec.preset("h100-sxm", gpus=ranks), mesh)
        stated = build_problem(traced, costs, OptimizerSpec("adamw"))
        for _ in range(CASES_PER_MESH):
            recompute, copies = rng.choice(RECOMPUTE_AND_COPIES)
            decisions = random_decisions(traced, stated, rng, recompute=recompute, keep_copies=copies)
            count = rng.choice((2, 3, 4))
            nodes = random_stages(traced, count, rng)
            schedule, pipe = rng.choice(
                [("gpipe", count), ("1f1b", count), ("zero-bubble", count)] + [("interleaved", 2)] * (count == 4)
            )
            weights = [rng.choice((0.5, 1.0, 0.25)), rng.choice((0.5, 1.0, 0.75))]
            try:
                program = emit_stages(traced, decisions, mesh, costs, nodes, reduce_each=rng.random() < 0.3)
                case = case_of_batches(traced, decisions, program, batches, weights)
                report = verify_pipeline(case, schedule_orders(schedule, pipe, MICRO_BATCHES, count // pipe))
            except AutoparError as error:
                raise AssertionError(f"model {seed}, mesh {mesh}, case {cases}: {error}") from error
            assert report.tolerance == 1e-9
            cases += 1
    return cases


@pytest.mark.parametrize("seed", range(MODELS_IN_TEST))
def test_random_cuts_compute_the_same(seed: int) -> None:
    assert check_model(seed) == CASES_PER_MESH * len(MESHES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(MODELS_IN_TEST, MODELS_IN_ALL))
def test_many_random_cuts_compute_the_same(seed: int) -> None:
    assert check_model(seed) == CASES_PER_MESH * len(MESHES)
