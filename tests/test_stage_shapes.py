"""Degrees for each stage: how they are written, what follows from them, and the mesh that all stages share."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.errors import LayoutError
from autopar.layout_text import short
from autopar.layouts import Layout, check_layout, parse_layout
from autopar.stage_shapes import Degrees, common_mesh


def test_text_dict_and_layout_say_the_same() -> None:
    layout = parse_layout("pp=2,dp=2/4,tp=2/1", 8)
    assert layout == Layout(pp=2, dp=(2, 4), tp=(2, 1)) == parse_layout({"pp": 2, "tp": [2, 1]}, 8)  # type: ignore[arg-type]
    assert layout == Layout(**layout.to_dict()) == parse_layout(str(layout), 8) == parse_layout(short(layout), 8)
    assert (layout.to_dict()["dp"], layout.to_dict()["tp"], layout.to_dict()["cp"]) == ([2, 4], [2, 1], 1)


def test_stages_that_are_alike_are_no_special_case() -> None:
    assert parse_layout("pp=2,dp=2/2,tp=2/2", 8) == Layout(pp=2, dp=2, tp=2)


def test_a_micro_batch_is_that_of_the_stage_with_most_data_ranks() -> None:
    layout = parse_layout("pp=3,dp=2/4/1,tp=2/1/4,micro_batch=3", 12)
    stages = [layout.of_rank(rank) for rank in range(3)]
    assert [one.micro_batch for one in stages] == [6, 3, 12]
    assert {one.micro_batches(24) for one in (layout, *stages)} == {2}
    assert [one.sp for one in stages] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "devices", "says"),
    [
        ("pp=2,dp=2/4,tp=2", 8, "stage 0 has dp .* = 4 ranks and stage 1 has dp .* = 8; give every stage as many"),
        ("pp=3,dp=2/4,tp=2/1", 12, "dp=2/4 has degrees for 2 stages, but pp=3; give one for each stage"),
        ("tp=2/1", 4, "tp=2/1 has degrees for 2 stages, but pp=1"),
        ("pp=2,dp=2/4,tp=2/x", 8, "tp=2/x must be whole numbers of at least 1"),
        ("pp=2,dp=2/3,tp=3/2", 12, "3 samples .* does not divide by dp=2 of stage 0; change micro_batch"),
        ("pp=2,dp=2/4,tp=2/1,ep=2", 8, "ep=2 does not go with stages of different shape"),
        ("pp=2,tp=2/3", 8, "does not divide the 8 devices"),
        ("pp=2,dp=2/4,tp=2/1", 16, "but the cluster has 16 devices"),
    ],
)
def test_degrees_that_cannot_be(text: str, devices: int, says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        parse_layout(text, devices)


def test_what_a_model_cannot_be_cut_by_is_asked_of_every_stage() -> None:
    layout = parse_layout("pp=2,dp=1/4,tp=4/1", 8)
    with pytest.raises(LayoutError, match="6 attention heads do not divide by tp=4"):
        check_layout(layout, global_batch=8, blocks=2, heads=6)
    with pytest.raises(LayoutError, match="global batch 6 does not divide"):
        check_layout(layout, global_batch=6, blocks=2, heads=8)


@pytest.mark.parametrize(
    ("shapes", "mesh", "roles"),
    [
        (((2, 1, 2), (4, 1, 1)), (2, 2), (("dp", "tp"), ("dp", "dp"))),
        (((1, 1, 8), (8, 1, 1)), (8,), (("tp",), ("dp",))),
        (((1, 2, 4), (2, 2, 2)), (2, 2, 2), (("cp", "tp", "tp"), ("dp", "cp", "tp"))),
    ],
)
def test_the_common_mesh_has_as_few_axes_as_will_do(shapes: Any, mesh: Any, roles: Any) -> None:
    assert common_mesh([Degrees(*one) for one in shapes]) == (mesh, roles)


@given(st.lists(st.permutations([1, 2, 2, 3]), min_size=1, max_size=4))
def test_on_the_common_mesh_every_stage_has_its_degrees(factors: list[list[int]]) -> None:
    shapes = [Degrees(a * b, c, d) for a, b, c, d in factors]
    mesh, roles = common_mesh(shapes)
    assert math.prod(mesh) == 12
    for one, of_stage in zip(shapes, roles, strict=True):
        axes = list(zip(mesh, of_stage, strict=True))
        assert Degrees(*(math.prod(s for s, role in axes if role == key) for key in Degrees._fields)) == one
