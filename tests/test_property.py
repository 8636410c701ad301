"""Whatever legal plan a random small model gets, its program computes the model's loss and gradients."""

from __future__ import annotations

import random
import re

import pytest

from autopar.cluster import ClusterSpec
from autopar.codegen.emit import emit
from autopar.codegen.overlap import overlap
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.errors import AutoparError
from autopar.runtime.execute import RankProgram
from autopar.sample import sample_values
from autopar.sharding import build_problem
from autopar.trace import trace
from autopar.verification import verify_program
from tests.graphs import random_model
from tests.random_plans import RECOMPUTE_AND_COPIES, random_decisions

MESHES = ((2,), (4,), (2, 2))
CASES_PER_MODEL = 6
MODELS_IN_TEST, MODELS_IN_ALL = 17, 334  # x 6: 102 and 2,004 cases


def check_model(seed: int) -> int:
    """Random plans of one random model on every mesh; returns how many were compared."""
    model, call = random_model(seed)
    traced = trace(model, call)
    values = sample_values(traced, model, call, seed)
    rng = random.Random(seed)
    cases = 0
    for mesh in MESHES:
        ranks = 4 if len(mesh) > 1 else mesh[0]
        costs = CostModel(ClusterSpec.preset("h100-sxm", gpus=ranks), mesh)
        stated = build_problem(traced, costs, OptimizerSpec("adamw"))
        for _ in range(CASES_PER_MODEL // len(MESHES)):
            recompute, copies = rng.choice(RECOMPUTE_AND_COPIES)
            shares = {"recompute": recompute, "keep_copies": copies, "offload": rng.choice((0.0, 0.5, 1.0))}
            decisions = random_decisions(traced, stated, rng, **shares)
            program = emit(traced, decisions, mesh, costs, bucket_bytes=rng.choice((0, 300, costs.bucket_bytes)))
            if rng.random() < 0.5:
                overlap(program.forward)
                overlap(program.backward)
            try:
                report = verify_program(traced, decisions, program, values)
            except AutoparError as error:
                raise AssertionError(f"model {seed}, mesh {mesh}, case {cases}: {error}") from error
            assert report.tolerance == 1e-9
            cases += 1
    return cases


@pytest.mark.parametrize("seed", range(MODELS_IN_TEST))
def test_random_plans_compute_the_same(seed: int) -> None:
    assert check_model(seed) == CASES_PER_MODEL


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(MODELS_IN_TEST, MODELS_IN_ALL))
def test_many_random_plans_compute_the_same(seed: int) -> None:
    assert check_model(seed) == CASES_PER_MODEL


def test_no_two_variables_of_a_program_share_a_name() -> None:
    """Inputs bear the names of ops ("mul_2"), and so do new nodes: in the generated code they must stay apart."""
    model, call = random_model(50)
    traced = trace(model, call)
    costs = CostModel(ClusterSpec.preset("h100-sxm", gpus=4), (4,))
    stated = build_problem(traced, costs, OptimizerSpec("adamw"))
    assigned = 0
    for seed in range(5):
        decisions = random_decisions(traced, stated, random.Random(seed))
        emitted = emit(traced, decisions, (4,), costs)
        program = RankProgram(emitted, ["0"], [0])
        for module in (program.forward_module, program.backward_module):
            names = re.findall(r"^    (\w+) = (?!None)", module.code, flags=re.MULTILINE)
            assert len(names) == len(set(names)), [n for n in names if names.count(n) > 1]
            assigned += len(names)
    assert assigned > 500
