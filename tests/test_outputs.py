"""Models that return tensors: the caller makes the loss, and everything is as on one device."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar.errors import Infeasible, RuntimeFailure
from autopar.runtime.memory import measure_peak
from autopar.trace import graph_hash, trace
from tests.launch import torchrun
from tests.models import BATCH, HIDDEN, ModelAndInputs, tiny_llama
from tests.outputs_ranks import CLASSES, criterion, heads


def classifier() -> ModelAndInputs:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(HIDDEN, 32), nn.ReLU(), nn.Linear(32, CLASSES)).double()
        return model, ((torch.randn(BATCH, HIDDEN, dtype=torch.float64),), {})


def llama_without_labels() -> ModelAndInputs:
    model, (_, kwargs) = tiny_llama(layers=1)
    return model, ((), {"input_ids": kwargs["input_ids"]})


MODELS: dict[str, Callable[[], ModelAndInputs]] = {
    "classifier": classifier,
    "heads": heads,
    "llama": llama_without_labels,
}


def program_of(model: nn.Module) -> autopar.Program:
    """The program on one device, which needs no process group."""
    return autopar.compile(copy.deepcopy(model), autopar.ClusterSpec.preset("cpu", gpus=1))


# -- what is traced ------------------------------------------------------------------------


def test_what_is_differentiable() -> None:
    model, call = heads()
    traced = trace(model, call)
    assert traced.loss is None
    assert [o.path for o in traced.outputs if o.tangent] == ["logits", "more[0].hidden", "more[1][0]", "twice"]
    assert [o.path for o in traced.outputs if not o.tangent] == ["more[1][1]", "classes", "scale", "name"]
    assert len(traced.tangents) == 4 and set(traced.whole_outputs) == {o.node for o in traced.outputs if o.node}


def test_a_loss_stays_the_only_differentiable_output() -> None:
    model, call = tiny_llama(layers=1)
    traced = trace(model, call)
    assert [o.path for o in traced.outputs if o.tangent] == ["loss"]
    assert traced.whole_outputs == (traced.loss,)


def test_layers_are_unrolled_as_without_loss() -> None:
    model, call = tiny_llama(layers=5)
    call = ((), {"input_ids": call[1]["input_ids"]})
    assert trace(model, call).twins
    assert graph_hash(trace(model, call)) == graph_hash(trace(model, call, unrolled=False))


# -- all ranks, simulated --------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pin", [{"mesh": [2]}, {"dp": 2, "tp": 2}], ids=["2", "2x2"])
def test_simulated_ranks_equal_one_device(name: str, pin: dict[str, Any]) -> None:
    model, call = MODELS[name]()
    gpus = 4 if "tp" in pin else 2
    plan = autopar.plan(model, autopar.ClusterSpec.preset("h100-sxm", gpus=gpus), example_inputs=call, pin=pin)
    assert autopar.Plan.loads(plan.dumps()) == plan
    report = autopar.verify(model, plan, example_inputs=call)
    assert report.ranks == gpus
    assert max(report.loss_error, report.worst_gradient_error) <= (1e-5 if name == "llama" else 1e-12)
    assert "outputs" in str(plan.explain())


def test_tightest_memory() -> None:
    model, call = heads()
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=2)
    with pytest.raises(Infeasible) as error:
        autopar.plan(model, cluster, example_inputs=call, memory_limit_bytes=1000)
    limit = error.value.needed_bytes
    plan = autopar.plan(model, cluster, example_inputs=call, memory_limit_bytes=limit)
    assert plan.predicted["peak_bytes"] <= limit
    assert autopar.verify(model, plan, example_inputs=call).worst_gradient_error <= 1e-12


# -- the program -----------------------------------------------------------------------------


def test_program_equals_eager_model() -> None:
    model, call = heads()
    program = program_of(model)
    for module in (model, program):
        module.zero_grad()
        criterion(module(*call[0])).backward()
    for (name, expected), (_, found) in zip(model.named_parameters(), program.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-12, msg=name)


def test_what_no_loss_is_made_of_gives_no_gradient() -> None:
    model, call = heads()
    program = program_of(model)
    for module in (model, program):
        module(*call[0])["more"][0]["hidden"].sum().backward()  # a gradient of stride 0, too
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == {n for n, p in program.named_parameters() if p.grad is None} == {"down.weight", "down.bias"}
    torch.testing.assert_close(program.up.weight.grad, model.up.weight.grad)


def test_inference_has_no_graph() -> None:
    model, call = heads()
    program = program_of(model).eval()
    with torch.no_grad():
        found, expected = program(*call[0]), model.eval()(*call[0])
    assert not found["logits"].requires_grad
    torch.testing.assert_close(found["logits"], expected["logits"])
    assert torch.equal(found["classes"], expected["classes"]) and found["name"] == "heads"


def test_train_step_says_where_the_loss_belongs() -> None:
    model, call = heads()
    with pytest.raises(RuntimeFailure, match=r"compute the loss of program\(...\) yourself and call loss.backward"):
        program_of(model).train_step(*call[0])


def test_a_result_that_was_changed_in_place_is_noticed() -> None:
    class Exponential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).exp()  # its own derivative

    program = program_of(Exponential())
    out = program(torch.ones(8, 4))
    out.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place before backward"):
        out.sum().backward()


def test_results_without_backward_are_freed() -> None:
    model, call = heads()
    program = program_of(model)
    out = program(*call[0])["logits"]
    gone = weakref.ref(out.grad_fn)
    del out
    gc.collect()
    assert gone() is None


def test_predicted_memory_holds_outputs_and_their_gradients() -> None:
    """A wide classifier whose outputs are most of the memory: predicted as measured with the loss `sum`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4096))
    x = torch.randn(64, 16)
    program = program_of(model)

    def step() -> None:
        out = program(x)
        out.backward(torch.ones_like(out))

    step()
    program.zero_grad(set_to_none=True)
    measured = measure_peak(step, program, x)
    predicted = program.plan.predicted
    without_optimizer = predicted["peak_bytes"] - predicted["breakdown"]["memory_bytes"]["optimizer"]
    assert without_optimizer == pytest.approx(measured, rel=0.05)


# -- real processes ---------------------------------------------------------------------------


def test_two_processes_equal_one(tmp_path: Path) -> None:
    ended = torchrun(Path(__file__).with_name("outputs_ranks.py"), 2, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-4000:]
    for rank in range(2):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert facts.pop("cut") > 0
        assert max(facts.values()) <= 1e-9, facts
