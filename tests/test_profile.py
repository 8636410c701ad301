"""`autopar profile`: what it measures, the file it writes, and plans priced by that file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar import cli
from autopar.cluster import ClusterSpec
from autopar.cost.collectives import MeshAxis, collective_time_s
from autopar.cost.compute import OpClass, op_time_s
from autopar.cost.optimizer import optimizer_time_s
from autopar.curves import CollectiveCurve, DeviceCurves, OpCurve, interpolated, rising
from autopar.errors import AutoparError, ClusterSpecError, RuntimeFailure
from autopar.profiling import run as profiling
from autopar.profiling.clock import Clock, lower_quartile
from autopar.profiling.ops import fit_rates
from autopar.profiling.spec import DeviceFacts, Measured, check_facts, device_spec, link_spec
from tests.launch import torchrun
from tests.models import ModelAndInputs, tiny_llama, tiny_mlp

WIDE = 2.5  # a prediction may be off by this factor: machines of tests are busy; a quiet one is within 0.15
CPU = ClusterSpec.preset("cpu", gpus=1)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, whose own clock does not run while other processes have the core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def measured(one_thread: None) -> tuple[ClusterSpec, list[str]]:
    """A quick profile of one process, and the progress it made."""
    told: list[str] = []
    return autopar.profile(quick=True, progress=told.append), told


# -- one process ------------------------------------------------------------------------------


def test_round_trip(measured: tuple[ClusterSpec, list[str]], tmp_path: Path) -> None:
    spec, told = measured
    spec.save(tmp_path / "cluster.json")
    loaded = ClusterSpec.load(tmp_path / "cluster.json")
    assert loaded == spec and hash(loaded) == hash(spec) and loaded.to_json() == spec.to_json()
    assert [p.name for p in tmp_path.iterdir()] == ["cluster.json"]
    assert any("gelu" in text for text in told) and any("links are not measured" in text for text in told)


def test_figures_are_plausible(measured: tuple[ClusterSpec, list[str]]) -> None:
    device = measured[0].device
    assert 1e-8 < device.launch_overhead_s < 1e-3 and 1e-8 < device.view_overhead_s < 1e-3
    assert 1e8 < device.peak_flops("float32") < 1e14 and 1e7 < device.memory_bytes_per_s < 1e13
    assert 0 < device.reserved_bytes < device.memory_bytes
    curves = device.measured
    assert {"matmul", "elementwise", "reduction", "other", "random", "convolution", "convolution_backward", "gelu",
            "_softmax", "native_layer_norm_backward", "optimizer"} <= {c.op for c in curves.ops}  # fmt: skip
    assert {(a.direction, a.dtype) for a in curves.attention} == {("forward", "float32"), ("backward", "float32")}
    for curve in curves.ops:
        assert len(curve.points) >= 2
        for (small, fast), (large, slow) in itertools.pairwise(curve.points):
            assert 0 < small < large and 0 < fast <= slow
    for name in ("matmul", "elementwise"):  # a thousand times the work takes longer than the smallest op
        curve = next(c for c in curves.ops if c.op == name)
        assert curve.points[-1][1] > 5 * curve.points[0][1]


def test_links_that_were_not_measured_are_said_to_be_missing(measured: tuple[ClusterSpec, list[str]]) -> None:
    spec = measured[0]
    assert spec.devices == 1 and spec.links == ()
    assert "links: not measured" in profiling.summary(spec)
    with pytest.raises(ClusterSpecError, match="has no link inside a node; add a first entry to links"):
        _ = spec.intra_link
    with pytest.raises(ClusterSpecError, match=r"cluster\.links has 0 entries"):
        dataclasses.replace(spec, devices_per_node=2)


def test_time_never_falls_with_work(measured: tuple[ClusterSpec, list[str]]) -> None:
    device = measured[0].device
    sizes = [0.0, *(10.0 ** (k / 4) for k in range(8, 48))]
    for kind in OpClass:
        for name in ("", "gelu", "_scaled_dot_product_flash_attention_for_cpu_backward"):
            by_bytes = [op_time_s(device, kind, 1e6, s, "float32", name) for s in sizes]
            by_flops = [op_time_s(device, kind, s, 1e6, "float32", name) for s in sizes]
            assert by_bytes == sorted(by_bytes) and by_flops == sorted(by_flops)
    assert op_time_s(device, OpClass.VIEW, 1e6, 1e6, "float32") == 0.0


class WideMLP(nn.Module):
    """Three layers of 384, whose matrix products are most of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(384, 384) for _ in range(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = x
        for layer in self.layers:
            hidden = nn.functional.gelu(layer(hidden))
        return {"loss": (hidden - x).square().mean()}


@pytest.mark.parametrize(
    "make", [lambda: (WideMLP(), ((torch.randn(256, 384),), {})), lambda: tiny_llama(torch.float32)]
)
def test_the_predicted_step_is_near_the_measured_one(measured: tuple[ClusterSpec, list[str]], make: Any) -> None:
    """One process: forward, backward and AdamW, in CPU seconds of its thread; a Llama is bound by launches."""
    model, call = make()
    program = autopar.compile(model, measured[0], example_inputs=call)
    assert program.plan is not None
    seconds = cpu_seconds_of_a_step(program, call)
    assert seconds / WIDE < program.plan.predicted["step_time_s"] < seconds * WIDE


def cpu_seconds_of_a_step(program: autopar.Program, call: ModelAndInputs | Any) -> float:
    optimizer = torch.optim.AdamW(program.parameters(), lr=1e-6)
    samples = []
    for _ in range(12):
        began = time.thread_time()
        program(*call[0], **call[1])["loss"].backward()
        optimizer.step()
        samples.append(time.thread_time() - began)
        optimizer.zero_grad()
    return lower_quartile(samples[2:])


def test_plans_are_priced_by_the_curves(measured: tuple[ClusterSpec, list[str]]) -> None:
    """A device whose every measured second counts twice takes twice the time."""
    spec = measured[0]
    slower = json.loads(spec.to_json())
    for curve in slower["device"]["measured"]["ops"]:
        curve["points"] = [[size, 2 * seconds] for size, seconds in curve["points"]]
    for rate in slower["device"]["measured"]["attention"]:
        rate["overhead_s"] *= 2
        rate["flops_per_s"] /= 2
        rate["bytes_per_s"] /= 2
    for key in ("view_overhead_s", "parameter_overhead_s"):
        slower["device"][key] *= 2
    model, call = tiny_llama(torch.float32)
    times = [
        autopar.plan(model, cluster, example_inputs=call).predicted["step_time_s"]
        for cluster in (spec, ClusterSpec.from_dict(slower))
    ]
    assert times[1] == pytest.approx(2 * times[0], rel=1e-6)


def test_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, measured: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(profiling, "profile", lambda quick, progress: measured[0] if quick else None)
    path = tmp_path / "cluster.json"
    assert cli.main(["profile", "--quick", "-o", str(path)]) == 0
    printed = capsys.readouterr()
    assert "GFLOP/s float32" in printed.out and str(path) in printed.out and "links: not measured" in printed.out
    assert ClusterSpec.load(path) == measured[0]
    assert cli.main(["profile", "-o", str(tmp_path / "no" / "x.json")]) == cli.EXIT_ERROR
    assert "does not exist or is not writable" in capsys.readouterr().err


# -- two ranks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a quick profile of two gloo processes."""
    path = tmp_path_factory.mktemp("profile") / "cluster.json"
    done = torchrun(Path("-m"), 2, "autopar.cli", "profile", "--quick", "-o", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written to") == 1
    return path


def test_collectives_of_two_ranks(two_ranks: Path) -> None:
    spec = ClusterSpec.load(two_ranks)
    assert (spec.nodes, spec.devices_per_node, len(spec.links)) == (1, 2, 1)
    curves = {(c.kind, c.ranks): c for c in spec.intra_link.measured}
    assert set(curves) == {(kind, 2) for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")}
    for (kind, _), curve in curves.items():
        assert 1e-6 < curve.points[0][1] <= curve.points[-1][1] < 10
        assert collective_time_s(kind, 1e5, MeshAxis(2, 1), spec) == curve.seconds(1e5)
    assert collective_time_s("broadcast", 1e6, MeshAxis(2, 1), spec) > 0  # by the model, from fitted figures


def test_a_plan_for_two_ranks_is_priced_by_their_curves(two_ranks: Path) -> None:
    spec = ClusterSpec.load(two_ranks)
    model, call = tiny_mlp()
    plan = autopar.plan(model, spec, example_inputs=call, pin={"tp": 2})
    link = spec.intra_link
    slower = tuple(dataclasses.replace(c, points=tuple((size, 10 * s) for size, s in c.points)) for c in link.measured)
    other = dataclasses.replace(spec, links=(dataclasses.replace(link, measured=slower),))
    again = autopar.plan(model, other, example_inputs=call, pin={"tp": 2})
    communication = [p.predicted["breakdown"]["communication_s"] for p in (plan, again)]
    assert communication[0] > 0 and communication[1] > 2 * communication[0]
    assert autopar.Plan.loads(plan.dumps()) == plan


def test_local_takes_a_profile(two_ranks: Path, monkeypatch: pytest.MonkeyPatch, measured: Any, tmp_path: Path) -> None:
    for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(variable, "2")
    spec = ClusterSpec.local(profile=two_ranks)
    assert spec.device.measured == ClusterSpec.load(two_ranks).device.measured and spec.devices == 2
    assert ClusterSpec.local().device.measured == DeviceCurves()
    measured[0].save(tmp_path / "one.json")
    with pytest.raises(ClusterSpecError, match=r"one\.json has 0 links, not enough for 1 nodes of 2; profile under"):
        ClusterSpec.local(profile=tmp_path / "one.json")
    ClusterSpec.preset("h200").save(tmp_path / "gpu.json")
    with pytest.raises(ClusterSpecError, match=r"gpu\.json describes .*H200, this node has a CPU"):
        ClusterSpec.local(profile=tmp_path / "gpu.json")


# -- the pieces -----------------------------------------------------------------------------------


def test_interpolation() -> None:
    points = ((10.0, 1.0), (20.0, 3.0), (40.0, 4.0))
    sizes = (0, 10, 15, 20, 30, 40, 80)
    assert [interpolated(points, s) for s in sizes] == [1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 8.0]
    assert rising([(3, 5.0), (1, 2.0), (2, 9.0), (1, 4.0)]) == ((1, 3.0), (2, 5.0), (3, 5.0))


@pytest.mark.parametrize(
    ("points", "says"),
    [
        ((), "1 to 64 pairs"),
        (((1.0, 1.0),) * 2, "sizes must rise"),
        (((1.0, 2.0), (2.0, 1.0)), "seconds must not fall"),
        (((1.0,),), "no pair"),
        (((0.0, 1.0),), "above 0"),
        (((1.0, float("nan")),), "finite"),
        (((1.0, True),), "finite"),
        (((1.0, "1"),), "finite"),
        (tuple((float(i), 1.0) for i in range(1, 66)), "1 to 64 pairs"),
        (7, "1 to 64 pairs"),
    ],
)
def test_points_that_are_no_curve(points: Any, says: str) -> None:
    for make in (lambda: OpCurve("mm", "float32", points), lambda: CollectiveCurve("all_reduce", 2, points)):
        with pytest.raises(ClusterSpecError, match=says):
            make()


def test_which_curve_counts() -> None:
    """The op's own, else its class's; another dtype serves only ops that go by bytes."""
    ops = (
        OpCurve("gelu", "float32", ((1.0, 7.0),)),
        OpCurve("elementwise", "float32", ((1.0, 5.0),)),
        OpCurve("elementwise", "bfloat16", ((1.0, 4.0),)),
        OpCurve("matmul", "float64", ((1.0, 3.0),)),
        OpCurve("optimizer", "float32", ((1.0, 9.0),)),
    )
    device = dataclasses.replace(CPU.device, measured=DeviceCurves(ops), parameter_overhead_s=1.0)
    elementwise = OpClass.ELEMENTWISE
    assert op_time_s(device, elementwise, 0.0, 1.0, "float32", "gelu") == 7.0
    assert op_time_s(device, elementwise, 0.0, 1.0, "bfloat16", "gelu") == 7.0
    assert op_time_s(device, elementwise, 0.0, 1.0, "bfloat16", "mul") == 4.0
    assert op_time_s(device, elementwise, 0.0, 1.0, "int64", "mul") == 5.0
    assert op_time_s(device, OpClass.MATMUL, 1.0, 0.1, "float64", "mm") == 5.0  # never less than its bytes take
    unmeasured = op_time_s(CPU.device, OpClass.MATMUL, 1.0, 0.1, "float32", "mm")
    assert op_time_s(device, OpClass.MATMUL, 1.0, 0.1, "float32", "mm") == unmeasured
    assert optimizer_time_s(device, 0.1, 0.1) == 10.0 and optimizer_time_s(device, 0, 0) == 0


def test_groups_of_a_size_that_was_not_measured_go_by_the_model() -> None:
    spec = ClusterSpec.preset("h100-sxm", gpus=16)
    flat = (CollectiveCurve("all_reduce", 2, ((1.0, 0.5),)),)
    links = tuple(dataclasses.replace(link, measured=flat) for link in spec.links)
    both = dataclasses.replace(spec, links=links)
    assert collective_time_s("all_reduce", 1.0, MeshAxis(2, 1), both) == 0.5
    assert collective_time_s("all_reduce", 1.0, MeshAxis(2, 8), both) == 0.5
    for axis in (MeshAxis(4, 1), MeshAxis(16, 1)):
        assert collective_time_s("all_reduce", 1.0, axis, both) == collective_time_s("all_reduce", 1.0, axis, spec)


def test_rates_are_found_again() -> None:
    sizes = [(f, b) for f in (1e6, 1e8, 1e10) for b in (1e4, 1e6, 1e8)]
    for overhead, flop, byte in ((1e-5, 1e-11, 1e-10), (0.0, 1e-11, 1e-10), (1e-5, 1e-11, 0.0)):
        samples = [(f, b, overhead + f * flop + b * byte) for f, b in sizes]
        assert fit_rates(samples) == pytest.approx((overhead, flop, byte), rel=1e-6, abs=1e-15)


def test_a_link_is_fitted_from_its_collectives() -> None:
    launch, hop, rate, ranks = 1e-4, 2e-5, 1e9, 4
    one_way = [(n, launch + 3 * hop + 0.75 * n / rate) for n in (1.0, 1e8)]
    both_ways = [(n, launch + 6 * hop + 1.5 * n / rate) for n in (1.0, 1e8)]
    curves = [
        CollectiveCurve("all_gather", ranks, tuple(one_way)), CollectiveCurve("all_reduce", ranks, tuple(both_ways))
    ]  # fmt: skip
    link, found_launch = link_spec("wire", curves)
    assert link.bytes_per_s == pytest.approx(rate, rel=1e-3)
    assert link.latency_s == pytest.approx(hop, rel=1e-3) and found_launch == pytest.approx(launch, rel=1e-3)


def test_a_known_gpu_keeps_the_peaks_of_its_maker() -> None:
    """What the CUDA path puts together, without a GPU: the matmul reached 600 of 989 TFLOP/s."""
    ops = (
        OpCurve("matmul", "bfloat16", ((1e9, 5e-6), (1e12, 1e12 / 600e12))),
        OpCurve("elementwise", "bfloat16", ((1e3, 5e-6), (3e9, 1e-3))),
    )
    facts = DeviceFacts("NVIDIA H100 80GB HBM3", "cuda", 80 << 30, 1 << 30)
    spec = device_spec(facts, Measured(4e-6, 2e-6, ops, ()))
    assert spec.peak_flops("bfloat16") == 989.4e12
    assert spec.matmul_efficiency_fraction == pytest.approx(600 / 989.4, rel=1e-3)
    unknown = device_spec(dataclasses.replace(facts, name="Chip 9"), Measured(4e-6, 2e-6, ops, ()))
    assert unknown.peak_flops("bfloat16") == pytest.approx(600e12) and unknown.matmul_efficiency_fraction == 1.0
    with pytest.raises(RuntimeFailure, match="are taken before a program starts"):
        check_facts(dataclasses.replace(facts, reserved_bytes=facts.memory_bytes))


def test_cuda_times_come_from_events_on_an_idle_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls that torch.cuda sees; no GPU is at hand to run it on."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, other: Event) -> float:
            log.append("read")
            return 2000.0

    fake = SimpleNamespace(Event=Event, synchronize=lambda device: log.append("wait"))
    monkeypatch.setattr(torch, "cuda", fake)
    clock = Clock(torch.device("cuda", 0), 1e-9)
    assert clock.seconds(lambda i: log.append("call")) == 2.0
    assert log[:2] == ["call", "call"]  # warm-up
    assert log[2:8] == ["wait", "record", "call", "record", "wait", "read"]


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, device_count=lambda: 1))
    for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(variable, "2")
    with pytest.raises(AutoparError, match="started 2 processes on a node with 1 GPUs; use --nproc-per-node 1"):
        autopar.profile()
