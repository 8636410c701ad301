"""A sequence that is cut takes its share of memory on every rank: activations fall as 1/p, and longer ones fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import autopar
from autopar.codegen.memory import simulate_memory
from autopar.errors import Infeasible
from autopar.runtime import world
from autopar.trace import trace
from autopar.verification import emit_for
from tests.peaks import TOLERANCE, assert_as_predicted, peak_of_training

RANKS = (1, 2, 4, 8)
TOKENS = 2048


def llama(tokens: int = TOKENS, batch: int = 1, vocab: int = 64) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A Llama with grouped keys in float32, and long sequences of random tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokens,
        use_cache=False,
    )
    ids = torch.randint(0, vocab, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids.clone()}


def pinned(ranks: int) -> dict[str, Any]:
    """All ranks share the sequence; nothing is computed twice to save memory, nothing else is cut."""
    return {"dp": 1, "cp": ranks, "tp": 1, "zero": 0, "recompute": "none"} if ranks > 1 else {"recompute": "none"}


def plan_for(ranks: int, batch: dict[str, torch.Tensor], model: nn.Module, **options: Any) -> autopar.Plan:
    """On CPUs, so that the program can run here."""
    cluster = autopar.ClusterSpec.preset("cpu", gpus=ranks)
    return autopar.plan(model, cluster, example_inputs=((), batch), **{"pin": pinned(ranks), **options})


def activations(plan: autopar.Plan, batch: dict[str, torch.Tensor], model: nn.Module) -> int:
    """The most bytes at any time beside parameters, their gradients and the optimizer's state."""
    points = simulate_memory(emit_for(trace(model, ((), batch)), plan), 0).points
    return max(point.activations + point.temporaries for point in points)


@pytest.mark.parametrize(
    ("ranks", "shape"),
    [
        ((1, 8), {}),
        *(pytest.param(RANKS, s, marks=pytest.mark.slow) for s in ({}, {"vocab": 1024}, {"batch": 2, "tokens": 1024})),
    ],
    ids=str,
)
def test_activations_fall_as_one_over_ranks(ranks: tuple[int, ...], shape: dict[str, int]) -> None:
    model, batch = llama(**shape)
    found = {of: activations(plan_for(of, batch, model), batch, model) * of for of in ranks}
    assert all(abs(found[of] - found[1]) <= TOLERANCE * found[1] for of in ranks), found


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_what_is_predicted_is_measured(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "start_heartbeat", lambda: None)  # there are no other ranks that could die
    model, batch = llama()
    plan = plan_for(ranks, batch, model)
    world.device_mesh.cache_clear()
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        program = autopar.compile(model, plan.cluster, plan=plan)
        measured = peak_of_training(program, batch)
    finally:
        dist.destroy_process_group()
        world.device_mesh.cache_clear()
    assert abs(measured - plan.predicted["peak_bytes"]) <= TOLERANCE * measured


def test_what_a_process_of_the_example_holds_is_predicted() -> None:
    assert_as_predicted("long_sequence", 4)


@pytest.mark.slow
def test_the_longest_sequence_grows_with_the_ranks() -> None:
    """What one device can just hold, as often as there are ranks, fits on so many."""
    model, batch = llama(TOKENS // 2)
    limit = plan_for(1, batch, model).predicted["peak_bytes"]
    with pytest.raises(Infeasible):
        plan_for(1, llama(TOKENS)[1], llama(TOKENS)[0], memory_limit_bytes=limit)
    for ranks in RANKS[1:]:
        longer, tokens = llama(TOKENS // 2 * ranks)
        pin = {**pinned(ranks), "zero": 3}
        assert plan_for(ranks, tokens, longer, memory_limit_bytes=limit, pin=pin).predicted["fits"]
