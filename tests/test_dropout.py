"""Random ops: as on one device where the result is whole, independent where it is cut, one mask in both passes."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autopar
from autopar._torch_compat import local_parts
from autopar.codegen.emit import emit
from autopar.cost.model import CostModel
from autopar.drawing import random_nodes
from autopar.errors import PlanError
from autopar.plans import Plan
from autopar.sample import sample_values
from autopar.segments import is_deterministic
from autopar.trace import Trace, is_backward, trace
from autopar.verification import (
    Simulation,
    drawn_numbers,
    emit_for,
    gradient_errors,
    run_reference,
    simulated_ranks,
)
from tests.dropout_ranks import dropout_bert
from tests.launch import torchrun
from tests.models import BATCH, HIDDEN, ModelAndInputs
from tests.parity.simulate import cluster


class Draws(nn.Module):
    """Every way to draw numbers that a model is likely to have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(HIDDEN, HIDDEN)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss of x [batch, seq, hidden]."""
        h = F.dropout(self.layer(self.drop(x)), 0.3, training=self.training)
        heads = h.view(*h.shape[:2], 8, -1).transpose(1, 2)
        h = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.2).transpose(1, 2).reshape(h.shape)
        h = F.dropout1d(F.alpha_dropout(h, 0.1, training=True), 0.2, training=True)
        h = h * torch.bernoulli(torch.sigmoid(h.detach())) + 0.1 * torch.randn_like(h) + torch.rand_like(h)
        h = h + torch.randn(h.shape[-1], dtype=h.dtype) * torch.randint(1, 3, h.shape[1:]).to(h.dtype)
        return (h + torch.empty_like(h).uniform_(-1, 1) + torch.empty_like(h).exponential_(2)).pow(2).mean()


def draws() -> ModelAndInputs:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Draws().double(), ((torch.randn(BATCH, 8, HIDDEN, dtype=torch.float64),), {})


def dropout_gpt2() -> ModelAndInputs:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "n_positions": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0)).train()
        ids = torch.randint(0, 64, (BATCH, 8))
    return model, ((), {"input_ids": ids, "labels": ids})


MODELS = {"draws": draws, "bert": dropout_bert, "gpt2": dropout_gpt2}


@cache
def bert_on_two() -> tuple[ModelAndInputs, Trace, Plan]:
    """BERT with dropout, its trace, and a data parallel plan."""
    of = dropout_bert()
    return of, trace(*of), planned(of, dp=2)


def planned(of: ModelAndInputs, **pin: Any) -> Plan:
    mesh = tuple(pin[k] for k in ("dp", "tp") if k in pin)
    return autopar.plan(of[0], cluster(mesh), example_inputs=of[1], pin=pin)


# -- whole -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_whole_results_are_those_of_one_device(name: str) -> None:
    """Loss, gradients and the state of the generator, to the last digit."""
    model, (args, kwargs) = MODELS[name]()
    program = autopar.compile(copy.deepcopy(model), autopar.ClusterSpec.preset("cpu", gpus=1))
    program.prepare((args, kwargs))
    seen = []
    for module, seed in ((model, 7), (program, 7), (program, 7), (program, 8)):
        module.zero_grad()
        torch.manual_seed(seed)
        result = module(*args, **kwargs)
        loss = result if isinstance(result, torch.Tensor) else result.loss
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        seen.append((loss.detach(), grads, torch.get_rng_state()))
    for eager, again in ((seen[0], seen[1]), (seen[1], seen[2])):
        assert torch.equal(eager[0], again[0]) and torch.equal(eager[2], again[2])
        torch.testing.assert_close(eager[1], again[1], rtol=1e-5, atol=1e-7)
    assert not torch.equal(seen[0][0], seen[3][0])


# -- in parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("pin", [{"dp": 2}, {"dp": 2, "tp": 2}], ids=["2", "2x2"])
@pytest.mark.parametrize("name", ["draws", "bert"])
def test_gradients_belong_to_the_masks(name: str, pin: dict[str, int]) -> None:
    """The single-device graph with the numbers that all ranks have drawn gives the same loss and gradients."""
    of = MODELS[name]()
    plan = bert_on_two()[2] if (name, pin) == ("bert", {"dp": 2}) else planned(of, **pin)
    cut = [n for n in random_nodes(trace(*of)) if "draw" in {r.lowering for r in plan.decisions.nodes[n].rules}]
    assert len(cut) >= 3
    report = autopar.verify(of[0], plan, example_inputs=of[1])
    assert max(report.loss_error, report.worst_gradient_error) <= 1e-9


def test_another_mask_would_be_noticed() -> None:
    """The comparison above means something: other numbers, another gradient."""
    (model, call), traced, plan = bert_on_two()
    values = sample_values(traced, model, call, 0)
    drawn = drawn_numbers(traced, plan.decisions, emit_for(traced, plan), values)
    right = run_reference(traced, values, drawn)
    name = next(iter(drawn))
    wrong = run_reference(traced, values, {**drawn, name: drawn[name].flip(0)})
    errors = gradient_errors(*({f: r[n] for f, n in traced.grads.items()} for r in (right, wrong)))
    assert max(errors.values()) > 1e-2


class Parts(Simulation):
    """A simulation that shows what each rank holds instead of the whole."""

    def gather(self, tensor: torch.Tensor, state: Any) -> Any:
        return local_parts(tensor)


@cache
def masks(seed: int, again: bool = False) -> dict[str, dict[int, torch.Tensor]]:
    """Each rank's part of the masks of two dropouts, cut on one axis and on both, on a mesh of 2 x 2."""
    model = nn.Sequential(nn.Dropout(0.25), nn.Linear(65, 256), nn.Dropout(0.25), nn.Linear(256, 8))
    call = ((torch.randn(254, 65),), {})  # neither the rows in four nor the columns in two
    plan, traced = planned((model, call), dp=2, tp=2), trace(model, call)
    states = {n: plan.decisions.nodes[n].result_states[1] for n in random_nodes(traced)}
    assert [[p[0] for p in state] for state in states.values()] == [["S", "R"], ["S", "S"]]
    emitted, values = emit_for(traced, plan), sample_values(traced, model, call, 0)
    with torch.random.fork_rng(), simulated_ranks(plan.mesh) as (groups, coordinates):
        parts = Parts(traced, plan.decisions, emitted, groups, coordinates)
        parts.seed = seed
        return parts.forward_values(values, set(states))  # type: ignore[return-value]


def test_parts_are_independent_and_copies_are_equal() -> None:
    rows, both = masks(1).values()
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3])
    for one, other in [(rows[0], rows[2]), *itertools.combinations(both.values(), 2)]:
        agree = (one == other).double().mean().item()  # 0.75^2 + 0.25^2 for independent masks
        assert abs(agree - 0.625) < 5 * (0.625 * 0.375 / one.numel()) ** 0.5
    for part in (rows[0], rows[2], *both.values()):
        assert abs(part.double().mean().item() - 0.75) < 5 * (0.75 * 0.25 / part.numel()) ** 0.5


def test_the_seed_decides() -> None:
    first, again, other = masks(1), masks(1, again=True), masks(2)
    for name, parts in first.items():
        assert all(torch.equal(parts[r], again[name][r]) for r in range(4))
        assert not any(torch.equal(parts[r], other[name][r]) for r in range(4))


@pytest.mark.parametrize(
    ("kind", "a", "b", "mean", "deviation"),
    [
        ("bernoulli", 0.3, 0.0, 0.3, 0.21**0.5),
        ("uniform", 2.0, 5.0, 3.5, 3 / 12**0.5),
        ("normal", 1.0, 2.0, 1.0, 2.0),
        ("exponential", 4.0, 0.0, 0.25, 0.25),
        ("random", -3.0, 9.0, 2.5, (143 / 12) ** 0.5),
    ],
)
def test_distributions(kind: str, a: float, b: float, mean: float, deviation: float) -> None:
    like = torch.empty(400, 100, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [torch.ops.autopar.draw(like, like.dtype, kind, a, b, part) for part in range(2)]
    for part in found:
        assert abs(part.mean().item() - mean) < 5 * deviation / part.numel() ** 0.5
        assert part.std().item() == pytest.approx(deviation, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([p.flatten() for p in found]))[0, 1].item()) < 5 / like.numel() ** 0.5


# -- recomputation ----------------------------------------------------------------------------


def test_masks_are_kept_and_products_run_again() -> None:
    of = dropout_bert()
    traced, plan = trace(*of), planned(of, dp=2, recompute="full")
    drawing = random_nodes(traced)
    assert drawing and not any(plan.decisions.nodes[n].recompute for n in drawing)
    assert all(f"{n}#1" in plan.decisions.kept for n in drawing if "native_dropout" in n)
    products = [n for n, d in plan.decisions.nodes.items() if n.startswith("dropped") and d.recompute]
    assert len(products) >= 3
    assert autopar.verify(of[0], plan, example_inputs=of[1]).worst_gradient_error <= 1e-9


def test_a_plan_that_draws_twice_is_refused() -> None:
    _, traced, plan = bert_on_two()
    name = random_nodes(traced)[1]
    twice = replace(plan.decisions.nodes[name], recompute=True)
    nodes = {**plan.decisions.nodes, name: twice}
    kept = frozenset(v for v in plan.decisions.kept if not v.startswith(name))
    with pytest.raises(PlanError, match=f"draws the random numbers of {name} twice; keep them"):
        emit(traced, replace(plan.decisions, nodes=nodes, kept=kept), plan.mesh, CostModel(plan.cluster, plan.mesh))


def test_attention_without_dropout_may_run_again() -> None:
    """Its op is marked random in torch for the sake of an argument that is zero here."""
    names = ("_scaled_dot_product", "native_dropout")
    marked = [n for n in attention_graph().nodes if any(part in str(n.target) for part in names) and not is_backward(n)]
    assert marked and all(is_deterministic(n) for n in marked)


def attention_graph() -> torch.fx.Graph:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(x)
            return F.scaled_dot_product_attention(x, x, x).sum()

    return trace(Attention(), ((torch.ones(2, 2, 4, 8),), {})).graph_module.graph


# -- real processes ---------------------------------------------------------------------------


def test_two_processes(tmp_path: Path) -> None:
    ended = torchrun(Path(__file__).with_name("dropout_ranks.py"), 2, str(tmp_path))
    assert ended.returncode == 0, ended.stderr[-4000:]
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert facts[0] == facts[1], "losses and generator states are the same on all ranks"
    for name, found in facts[0].items():
        if name != "refused":
            losses = found["losses"]
            assert losses[-1] < 0.9 * losses[0], f"{name} does not learn: {losses}"
            assert found["again"] == losses[0] and found["other seed"] != losses[0]
    whole = facts[0]["whole"]
    assert whole["losses"] == pytest.approx(whole["eager"], rel=1e-9)
    assert facts[0]["cut"]["draws in parts"] > 0
    assert "rank 1 has another random state than rank 0" in facts[0]["refused"]
