"""Mixed precision: as the model under autocast on one device, with gradients summed over ranks in float32.

Tolerances: a bfloat16 number has 8 binary digits, so a sum in another order may differ by 2^-8 of its largest
term, and more of the sum where terms cancel. Losses are float32 means over the batch, held to 1e-2 of the autocast
run (measured: 5e-6). Gradients are held to what bfloat16 costs at all: how far the simulated ranks are from the float32
gradients, against how far the autocast run is (measured: 0.7 to 1.2 times as far, 1.9 times for one LayerNorm weight
behind an activation that four ranks summed in bfloat16).
"""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import autopar
from autopar.cli import EXIT_OK, main
from autopar.codegen.builder import is_collective
from autopar.codegen.emit import EmittedProgram
from autopar.errors import AutoparError, PlanError, PlanMismatch, RuntimeFailure, TraceError
from autopar.plans import Plan
from autopar.sample import sample_values
from autopar.trace import Trace, trace
from autopar.verification import Simulation, emit_for, gradient_errors, relative_error, run_reference, simulated_ranks
from tests.launch import torchrun
from tests.models import ModelAndInputs, tiny_bert, tiny_llama, tiny_mlp
from tests.parity.simulate import cluster as slow_cluster

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 3e-2
# How much farther from float32 than the model's own autocast run: as a rule not at all; the worst gradient may be one
# whose activations were summed over ranks in bfloat16, which rounds once more per axis.
TYPICAL_FACTOR, WORST_FACTOR, ENOUGH = 1.25, 2.5, 10  # parameters for a median to mean something


class Convolutions(nn.Module):
    """Two convolutions with a group norm, packed and tied weights, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.packed = nn.Parameter(torch.randn(16, 8) * 0.1)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of images [batch, 4, height, width]."""
        h = torch.relu(self.norm(self.into(x))).mean((2, 3))
        first, second = self.packed.chunk(2)
        h = self.tied(torch.tanh(self.tied(h)) @ first) @ (0.5 * second)
        return nn.functional.cross_entropy(h, target)


def convolutions() -> ModelAndInputs:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Convolutions(), ((torch.randn(8, 4, 8, 8), torch.arange(8)), {})


def large_batch() -> ModelAndInputs:
    """An MLP with so many samples that summing gradients is cheaper than gathering activations."""
    model, (_, kwargs) = tiny_mlp(torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, target = torch.randn(4096, 64), torch.randint(0, 16, (4096,))
    return model, ((x,), {**kwargs, "target": target})


MODELS: dict[str, Callable[[], ModelAndInputs]] = {
    "mlp": lambda: tiny_mlp(torch.float32),
    "bert": lambda: tiny_bert(torch.float32, layers=1),
    "llama": lambda: tiny_llama(torch.float32, layers=1, tied=True),
    "convolutions": convolutions,
    "batch": large_batch,
}
CLOSE = ("mlp", "bert", "llama", "convolutions")
PINS: dict[str, dict[str, Any]] = {
    "free": {"mesh": [2]},
    "zero3": {"dp": 2, "zero": 3},
    "ddp": {"dp": 2, "zero": 0},
    "tp": {"dp": 2, "tp": 2},
}


def cluster(mesh: tuple[int, ...]) -> autopar.ClusterSpec:
    """The slow devices of the parity tests, twice as fast in bfloat16."""
    spec = slow_cluster(mesh)
    return replace(spec, device=replace(spec.device, peak_flops_per_s=(("float32", 1e9), ("bfloat16", 2e9))))


@cache
def planned(name: str, pin: str) -> tuple[ModelAndInputs, Trace, Plan]:
    model, call = MODELS[name]()
    mesh = (2, 2) if "tp" in PINS[pin] else (2,)
    plan = autopar.plan(model, cluster(mesh), example_inputs=call, pin=PINS[pin], precision="bf16", time_limit_s=10)
    return (model, call), trace(model, call, precision="bf16"), plan


@cache
def eager(name: str, autocast: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the user's own run, under autocast or in float32."""
    model, (args, kwargs) = MODELS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = model(*args, **kwargs)
    loss = result if isinstance(result, torch.Tensor) else result["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# -- as under autocast -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLOSE)
def test_trace_is_the_model_under_autocast(name: str) -> None:
    model, call = MODELS[name]()
    traced = trace(model, call, precision="bf16")
    values = run_reference(traced, sample_values(traced, model, call, 0))
    loss, grads = eager(name)
    assert traced.loss is not None and relative_error(values[traced.loss], loss) <= 1e-6
    errors = gradient_errors({f: values[n] for f, n in traced.grads.items()}, grads)
    assert max(errors.values()) <= (1e-6 if name in ("mlp", "bert") else 1e-2)  # tied: summed in float32, not bfloat16
    assert all(p.dtype == torch.float32 for p in traced.params)


@pytest.mark.parametrize("pin", ["free", "tp"])
@pytest.mark.parametrize("name", CLOSE)
def test_simulated_ranks_are_close_to_autocast(name: str, pin: str) -> None:
    (model, call), traced, plan = planned(name, pin)
    emitted, values = emit_for(traced, plan), sample_values(traced, model, call, 0)
    with simulated_ranks(plan.mesh) as (groups, coordinates):
        outputs, found = Simulation(traced, plan.decisions, emitted, groups, coordinates).step(values)
    loss, grads = eager(name)
    assert relative_error(outputs[str(traced.loss)], loss) <= LOSS_TOLERANCE
    assert all(g.dtype == torch.float32 for g in found.values())
    exact = eager(name, autocast=False)[1]
    errors, own_errors = (list(gradient_errors(g, exact).values()) for g in (found, grads))
    off, expected = max(errors), max(own_errors)
    assert 1e-4 < off <= WORST_FACTOR * expected
    if len(errors) >= ENOUGH:
        assert statistics.median(errors) <= TYPICAL_FACTOR * statistics.median(own_errors)
    report = autopar.verify(model, plan, example_inputs=call)
    if name == "convolutions":  # small differences of large terms: low precision costs the model itself more
        assert report.tolerance == pytest.approx(2 * expected, rel=0.05)
    else:
        assert report.tolerance == 6e-2 and report.worst_gradient_error <= GRADIENT_TOLERANCE
        assert max(gradient_errors(found, grads).values()) <= GRADIENT_TOLERANCE


# -- sums in float32 ---------------------------------------------------------------------------

# What lies between a gradient that is handed out and the op that computes it: layout, casts and sums.
LAYOUT = frozenset(
    {
        "wait_tensor", "getitem", "clone", "reshape", "view", "_unsafe_view", "permute", "t", "transpose", "cat",
        "slice", "expand", "squeeze", "unsqueeze", "all_gather_into_tensor", "all_to_all_single", "all_reduce",
        "all_reduce_coalesced", "reduce_scatter_tensor", "_to_copy", "add", "mul", "div", "stack", "slice_backward",
        "select_backward", "constant_pad_nd", "empty", "copy",
    }
)  # fmt: skip
SUMS = ("all_reduce", "all_reduce_coalesced", "reduce_scatter_tensor")


def writers(buffer: fx.Node) -> list[fx.Node]:
    """Who writes into parts of a buffer."""
    found = []
    for user in buffer.users:
        found += writers(user) if str(user.target) in ("aten.slice.Tensor", "aten.view.default") else [user]
    return found


def gradient_sums(emitted: EmittedProgram) -> list[torch.Tensor]:
    """What is summed over ranks to make gradients of parameters."""
    output = next(iter(emitted.backward.find_nodes(op="output")))
    stack, seen, found = list(output.all_input_nodes), set(), []
    while stack:
        node = stack.pop()
        name = getattr(node.target, "_schema", None) and node.target._schema.name.split("::")[-1]
        name = (name or getattr(node.target, "__name__", "")).removesuffix("_")  # the same op in place
        if node in seen or name not in LAYOUT:
            continue
        seen.add(node)
        if is_collective(node) and name in SUMS:
            found += [source.meta["val"] for source in node.all_input_nodes]
        if name == "empty":
            stack += writers(node)
        stack += [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor) or is_collective(n)]
    return found


@pytest.mark.parametrize(
    ("name", "pin"), [("batch", "ddp"), ("batch", "zero3"), ("batch", "tp"), ("bert", "ddp"), ("convolutions", "ddp")]
)
def test_gradients_are_summed_in_float32(name: str, pin: str) -> None:
    _, traced, plan = planned(name, pin)
    summed = gradient_sums(emit_for(traced, plan))
    assert {t.dtype for t in summed} == {torch.float32}
    if (name, pin) == ("batch", "ddp"):
        assert sum(t.numel() for t in summed) == sum(math.prod(p.shape) for p in traced.params)


def test_without_the_rule_they_would_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above means something: sums in bfloat16 are cheaper, and would be found."""
    for module in ("autopar.sharding", "autopar.pricing", "autopar.codegen.emit"):
        monkeypatch.setattr(f"{module}.narrow_gradients", lambda flow, nodes: frozenset())
    model, call = large_batch()
    plan = autopar.plan(model, cluster((2,)), example_inputs=call, pin={"dp": 2, "zero": 3}, precision="bf16")
    summed = gradient_sums(emit_for(trace(model, call, precision="bf16"), plan))
    assert torch.bfloat16 in {t.dtype for t in summed}


def test_weights_are_gathered_in_bfloat16() -> None:
    """A parameter is cast where it lies, so half the bytes travel."""
    _, traced, plan = planned("mlp", "zero3")
    gathers = [n for n in emit_for(traced, plan).forward.nodes if "all_gather" in str(n.target)]
    assert gathers and all(n.all_input_nodes[0].meta["val"].dtype == torch.bfloat16 for n in gathers)


# -- plans -------------------------------------------------------------------------------------


def test_time_and_memory_know_the_dtypes() -> None:
    model, call = tiny_llama(torch.float32, layers=1)
    options: dict[str, Any] = {"example_inputs": call, "pin": {"dp": 2, "zero": 0}}
    narrow, wide = (autopar.plan(model, cluster((2,)), precision=p, **options).predicted for p in ("bf16", "fp32"))
    assert narrow["step_time_s"] < wide["step_time_s"]
    memory, expected = narrow["breakdown"]["memory_bytes"], wide["breakdown"]["memory_bytes"]
    assert memory["parameters"] == expected["parameters"] and memory["optimizer"] == expected["optimizer"]


def test_precision_is_part_of_a_plan() -> None:
    (model, _), _, plan = planned("mlp", "free")
    assert plan.options.precision == "bf16" == Plan.loads(plan.dumps()).options.precision
    assert plan.explain().to_dict()["precision"] == "bf16"
    with pytest.raises(PlanError, match="expected one of model, fp32, bf16, found fp8"):
        Plan.loads(plan.dumps().replace('"precision": "bf16"', '"precision": "fp8"'))
    with pytest.raises(PlanMismatch, match="the plan is for precision='bf16', not 'fp32'"):
        autopar.compile(model, plan.cluster, plan=plan, precision="fp32")


def test_unknown_and_unfit_precisions() -> None:
    model, call = tiny_mlp(torch.float32)
    one = autopar.ClusterSpec.preset("cpu", gpus=1)
    with pytest.raises(AutoparError, match="precision='fp8' is unknown; use one of model, fp32, bf16"):
        autopar.plan(model, one, example_inputs=call, precision="fp8")
    for precision in ("bf16", "fp32"):
        with pytest.raises(TraceError, match=r"wants float32 parameters, but up.weight is bfloat16; call model.float"):
            autopar.plan(model.bfloat16(), one, example_inputs=call, precision=precision)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "plan.json")
    options = ["--seq", "16", "--global-batch", "8", "--gpus", "2", "--time-limit-s", "2", "--precision", "bf16"]
    assert main(["plan", "--model", "tests.test_precision:build", "--cluster", "cpu", *options, "-o", path]) == EXIT_OK
    capsys.readouterr()
    assert main(["verify", path, "--json"]) == EXIT_OK
    assert json.loads(capsys.readouterr().out)["tolerance"] == 6e-2


class Regression(nn.Module):
    """A model for the command line, which loads it in float32 whatever its own dtype is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss of x [batch, 16]."""
        return self.layer(x).pow(2).mean()

    def example_inputs(self, batch: int, seq: int) -> Any:
        """One argument, by name."""
        return (), {"x": torch.zeros(batch, 16)}


def build() -> nn.Module:
    """What `--model` names."""
    return Regression()


# -- the program -------------------------------------------------------------------------------


def test_an_autocast_around_the_program() -> None:
    model, (args, kwargs) = tiny_mlp(torch.float32)
    one = autopar.ClusterSpec.preset("cpu", gpus=1)
    mixed, plain = (autopar.compile(copy.deepcopy(model), one, precision=p) for p in ("bf16", None))
    loss = mixed(*args, **kwargs)["loss"]
    assert relative_error(loss.detach(), eager("mlp")[0]) <= 1e-6
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mixed(*args, **kwargs)["loss"], loss)
        mixed.train_step(*args, **kwargs)
        with pytest.raises(RuntimeFailure, match=r"precision='model' and is called under autocast to torch\.bfloat16"):
            plain(*args, **kwargs)


def test_two_processes(tmp_path: Path) -> None:
    ended = torchrun(Path(__file__).with_name("precision_ranks.py"), 2, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-4000:]
    for rank in range(2):
        for name, facts in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert facts["dtypes"] == ["torch.float32"], f"{name}: weights, gradients and optimizer state"
            assert max(facts["loss"]) <= LOSS_TOLERANCE, (name, facts)
            assert facts["gradient"] <= GRADIENT_TOLERANCE, (name, facts)
            assert facts["cut"] > 0
