"""What a faster part buys: never less than nothing, all of them together as much as they should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar import ClusterSpec
from autopar.cost.collectives import MeshAxis, collective_time_s
from autopar.cost.compute import OpClass, op_time_s
from autopar.curves import AttentionRate, CollectiveCurve, DeviceCurves, OpCurve
from autopar.explaining.faster import FASTER, faster_clusters
from autopar.units import seconds_text
from tests.explaining.reports import predicted, report


def test_of_a_plan() -> None:
    found = report().faster
    plan = report().plan
    names = [
        "arithmetic",
        "memory bandwidth",
        "host and launches",
        *(f"link {link.name}" for link in plan.cluster.links),
    ]
    assert sorted(f.what for f in found) == sorted(names)
    assert all(-1e-12 < -f.extra_s <= plan.objective_s * (1 - 1 / FASTER) + 1e-12 for f in found)
    assert [f.extra_s for f in found] == sorted(f.extra_s for f in found) and found[0].extra_s < 0
    # with all of them faster only latencies stay: no more than all parts of it, each alone
    assert sum(-f.extra_s for f in found) == pytest.approx(plan.objective_s * (1 - 1 / FASTER), rel=0.15)


def test_of_a_prediction() -> None:
    made = predicted()
    for one in made.faster:
        assert one.before_s == made.best.step_time_s and one.step_time_s <= one.before_s
    again = made.predictor.price(made.best.layout)
    assert again.step_time_s == made.best.step_time_s, "the report's own prices are untouched"
    text = "\n".join(made.lines())
    assert made.faster[0].what in text and seconds_text(made.neighbours[0].baseline.step_time_s)


def test_measured_curves_get_faster_too() -> None:
    cluster = ClusterSpec.preset("h100-sxm", gpus=8)
    curves = DeviceCurves(
        (OpCurve("matmul", "bfloat16", ((1e9, 1e-4), (1e12, 1e-2))),),
        (AttentionRate("forward", "bfloat16", 1e-5, 1e14, 1e12),),
    )
    link = replace(cluster.links[0], measured=(CollectiveCurve("all_reduce", 8, ((1e3, 1e-5), (1e9, 1e-2))),))
    measured = replace(cluster, device=replace(cluster.device, measured=curves), links=(link, *cluster.links[1:]))
    found = dict(faster_clusters(measured))
    assert set(found) == {"kernels, as measured", *(f"link {one.name}" for one in cluster.links)}
    kernels = found["kernels, as measured"].device
    for kind, flops in ((OpClass.MATMUL, 1e11), (OpClass.ATTENTION, 1e12)):
        before, after = (op_time_s(d, kind, flops, 1e8, "bfloat16") for d in (measured.device, kernels))
        assert after == pytest.approx(before / FASTER)
    axis = MeshAxis(8, 1)
    before, after = (collective_time_s("all_reduce", 1e8, axis, c) for c in (measured, found[f"link {link.name}"]))
    assert after == pytest.approx(before / FASTER)
