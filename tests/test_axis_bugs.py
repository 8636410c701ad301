"""Bugs on meshes of three axes: a collective along the wrong axis moves as many bytes, in the same order everywhere."""

from __future__ import annotations

from functools import cache

import pytest
from torch import fx

import autopar
from autopar.codegen.builder import group_token, is_collective
from autopar.codegen.emit import EmittedProgram
from autopar.errors import VerifyError
from autopar.plans import Plan
from autopar.sample import sample_values
from autopar.trace import Trace, trace
from autopar.verification import emit_for, verify_program
from tests.models import ModelAndInputs, tiny_mlp

MESH = (2, 2, 2)


@cache
def planned() -> tuple[ModelAndInputs, Trace, Plan]:
    """An MLP whose weights are cut along every axis."""
    model, call = tiny_mlp()
    cluster = autopar.ClusterSpec.preset("a100-80g", gpus=8)
    return (model, call), trace(model, call), autopar.plan(model, cluster, example_inputs=call, pin={"tp": MESH})


def along(program: EmittedProgram, axis: int) -> list[fx.Node]:
    """The collectives of an axis."""
    nodes = [*program.forward.nodes, *program.backward.nodes]
    return [n for n in nodes if is_collective(n) and group_token(axis) in n.args]


@pytest.mark.parametrize("axis", range(len(MESH)))
def test_a_collective_along_the_wrong_axis(axis: int) -> None:
    (model, call), traced, plan = planned()
    assert plan.mesh == MESH
    program = emit_for(traced, plan)
    node = along(program, axis)[0]
    other = group_token((axis + 1) % len(MESH))
    node.args = tuple(other if a == group_token(axis) else a for a in node.args)
    with pytest.raises(VerifyError) as error:
        verify_program(traced, plan.decisions, program, sample_values(traced, model, call, 0))
    assert error.value.node is not None and error.value.node in str(error.value)


def test_without_a_bug() -> None:
    (model, call), traced, plan = planned()
    verify_program(traced, plan.decisions, emit_for(traced, plan), sample_values(traced, model, call, 0))
