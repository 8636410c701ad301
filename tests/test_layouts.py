"""Layouts: how they are read, what follows from what, and one clear error for each mistake."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.errors import LayoutError
from autopar.layouts import KEYS, Layout, check_layout, parse_layout


def test_command_line_form() -> None:
    text = "dp=1,tp=8,pp=8,vpp=3,micro_batch=1,zero=0,sp=true,recompute=selective"
    assert parse_layout(text, 64) == Layout(dp=1, tp=8, pp=8, vpp=3, sp=True, recompute="selective")
    assert parse_layout(" tp = 8 , grad_dtype = none ", 8) == Layout(tp=8, grad_dtype=None)


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({}, "sp", False),
        ({}, "schedule", "none"),
        ({}, "grad_dtype", "float32"),
        ({"tp": 8}, "sp", True),
        ({"tp": 8, "sp": False}, "sp", False),
        ({"sp": True}, "sp", False),
        ({"pp": 2}, "schedule", "1f1b"),
        ({"pp": 2, "schedule": "zero-bubble"}, "schedule", "zero-bubble"),
        ({"pp": 2, "vpp": 2}, "schedule", "interleaved"),
        ({"schedule": "1f1b"}, "schedule", "none"),
    ],
)
def test_defaults(given: dict[str, Any], key: str, value: Any) -> None:
    assert getattr(Layout(**given), key) == value


def test_dp_follows_from_the_devices() -> None:
    assert parse_layout("tp=4,pp=2,cp=2", 64).dp == 4
    assert parse_layout({"dp": None, "sp": None, "grad_dtype": None}, 8) == Layout(dp=8, grad_dtype=None)
    assert parse_layout(Layout(dp=8), 8) == Layout(dp=8)


def test_expert_ranks_are_taken_out_of_dp_and_cp() -> None:
    layout = parse_layout("tp=2,cp=2,ep=8", 32)
    assert (layout.dp, layout.devices) == (8, 32)
    assert Layout(dp=2, cp=2, ep=4).devices == 4


def test_a_count_of_recomputed_blocks_needs_recomputation() -> None:
    assert parse_layout("recompute=full,recompute_blocks=3", 1).recompute_blocks == 3
    assert parse_layout("recompute_blocks=none", 1).recompute_blocks is None
    with pytest.raises(LayoutError, match="recompute_blocks=3 goes with recompute=full"):
        Layout(recompute_blocks=3)


def test_micro_batches() -> None:
    assert Layout(dp=4, micro_batch=2).micro_batches(64) == 8


layouts = st.builds(
    lambda degrees, tp, sp, zero, recompute, grads, ep: Layout(
        **degrees, tp=tp, sp=sp, zero=zero, recompute=recompute, grad_dtype=grads, dp=2 * ep, ep=ep
    ),
    st.sampled_from([{}, {"pp": 2}, {"pp": 2, "vpp": 3}, {"pp": 4, "schedule": "gpipe"}]),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from(["none", "selective", "full"]),
    st.sampled_from([None, "float32", "bfloat16"]),
    st.integers(1, 4),
)


@given(layouts)
def test_round_trips(layout: Layout) -> None:
    assert tuple(layout.to_dict()) == KEYS
    assert parse_layout(str(layout), layout.devices) == layout
    assert parse_layout(layout.to_dict(), layout.devices) == layout


BAD: list[tuple[Any, str]] = [
    ("tp", r"expected KEY=VALUE,KEY=VALUE, found 'tp' in 'tp'"),
    ("", r"expected KEY=VALUE,KEY=VALUE, found ''"),
    ("tp=8,tp=8", "tp is given twice; keep one"),
    ("tpp=8", r"unknown key 'tpp' \(did you mean tp\?\); the keys are dp, tp"),
    ({"microbatch": 8}, r"unknown key 'microbatch' \(did you mean micro_batch\?\)"),
    ({8: 8}, "unknown key 8"),
    (["tp=8"], "expected text such as tp=8,pp=2, a dict or a Layout, got list"),
    ("tp=x", "tp=x is not a whole number"),
    ("tp=8.0", "tp=8.0 is not a whole number"),
    ({"tp": True}, "tp=True is not a whole number"),
    ("tp=0", "tp=0 is out of range; give at least 1"),
    ("pp=-2", "pp=-2 is out of range; give at least 1"),
    ("micro_batch=0", "micro_batch=0 is out of range"),
    ("zero=4", "zero=4 is out of range; give 0 to 3"),
    ("tp=2,sp=yes", "sp='yes' is not true or false"),
    ("recompute=ful", r"unknown recompute=ful \(did you mean full\?\); give one of none, selective, full"),
    ("pp=2,schedule=1f1", r"unknown schedule=1f1 \(did you mean 1f1b\?\)"),
    ({"schedule": 3}, "unknown schedule=3; give one of"),
    ("grad_dtype=int8", "unknown grad_dtype=int8"),
    ("vpp=2", "vpp=2 needs a pipeline; give pp of at least 2, or leave vpp out"),
    ("pp=2,schedule=none", "schedule=none goes with pp=1 only, found pp=2; try schedule=1f1b"),
    ("pp=2,vpp=2,schedule=1f1b", "schedule=1f1b does not go with vpp=2; use schedule=interleaved"),
    ("pp=2,schedule=interleaved", "schedule=interleaved does not go with vpp=1; give vpp of at least 2"),
    ("ep=3", r"ep=3 does not divide dp \* cp = 8"),
    ("tp=3", r"tp \* pp \* cp = 3 \* 1 \* 1 = 3 does not divide the 8 devices"),
    ("dp=2,tp=2", r"dp \* tp \* pp \* cp = 2 \* 2 \* 1 \* 1 = 4, but the cluster has 8 devices"),
    (Layout(dp=4), r"= 4 \* 1 \* 1 \* 1 = 4, but the cluster has 8 devices"),
]


@pytest.mark.parametrize(("layout", "problem"), BAD, ids=[str(layout) for layout, _ in BAD])
def test_bad_layout(layout: Any, problem: str) -> None:
    with pytest.raises(LayoutError, match=problem) as caught:
        parse_layout(layout, 8)
    assert str(caught.value).startswith("layout: ") and "\n" not in str(caught.value)


MODEL = {"global_batch": 64, "blocks": 12, "heads": 16, "kv_heads": 2, "seq": 2048}
UNFIT: list[tuple[Layout, dict[str, int], str]] = [
    (Layout(dp=6), {}, r"global batch 64 does not divide by dp \* micro_batch = 6 \* 1 = 6; change micro_batch"),
    (Layout(dp=2, micro_batch=64), {}, r"= 2 \* 64 = 128"),
    (Layout(pp=8, vpp=2), {}, r"pp \* vpp = 8 \* 2 = 16 stages, but the model has 12 blocks; lower pp or vpp"),
    (Layout(pp=3, vpp=2), {}, "interleaved schedule needs a multiple of pp=3 micro-batches, found 64"),
    (Layout(tp=3), {}, "16 attention heads do not divide by tp=3"),
    (Layout(tp=4), {"kv_heads": 6}, "tp=4 neither divides the 6 key-value heads nor is a multiple"),
    (Layout(cp=3), {}, "2048 tokens do not divide by cp = 3"),
    (Layout(cp=2, tp=8), {"seq": 1000}, r"1000 tokens do not divide by cp \* tp \(sp=true\) = 16"),
]


@pytest.mark.parametrize(("layout", "changed", "problem"), UNFIT)
def test_unfit_for_the_model(layout: Layout, changed: dict[str, int], problem: str) -> None:
    with pytest.raises(LayoutError, match=problem):
        check_layout(layout, **{**MODEL, **changed})


def test_fit_for_the_model() -> None:
    check_layout(Layout(dp=4, tp=8, pp=4, vpp=2, micro_batch=2), **MODEL)
    check_layout(Layout(cp=2, tp=8, sp=False), **{**MODEL, "seq": 1000})
    check_layout(Layout(tp=3), global_batch=1, blocks=1)
