"""Where sequences or weights are cut, logits are never put together, op by op and in stages: seen in what is sent.

Of the model's dims only the vocabulary is a multiple of 37, and only tokens are counted in threes: logits, whole, in
parts or flattened, are what has both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
import autopar.api
from autopar._torch_compat import FakeTensorMode, pytree
from autopar.codegen.builder import GraphBuilder, is_collective
from autopar.runtime.make_stages import staged_program
from autopar.staged import StagedPlan
from autopar.trace import trace
from autopar.verification import emit_for
from tests.models import ModelAndInputs

VOCAB, BATCH, SEQUENCE = 8 * 37, 4, 24
OF_LOGITS = 3 * 37


def llama(layers: int) -> ModelAndInputs:
    """Grouped keys, a vocabulary of its own."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=SEQUENCE, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(VOCAB, (BATCH, SEQUENCE))
    return LlamaForCausalLM(config), ((), {"input_ids": ids, "labels": ids.clone()})


def graphs_of(pin: dict[str, Any]) -> Iterator[fx.Graph]:
    """All that a rank of each stage runs in a training step."""
    model, call = llama(pin.get("pp", 1))
    devices = math.prod(pin.get(role, 1) for role in ("dp", "cp", "tp", "pp"))
    plan = autopar.plan(model, autopar.ClusterSpec.preset("cpu", gpus=devices), example_inputs=call, pin=pin)
    if not isinstance(plan, StagedPlan):
        emitted = emit_for(trace(model, call), plan)
        yield from (emitted.forward, emitted.backward)
        return
    made = staged_program(
        model, call, plan, lambda one: trace(model, one), autopar.api._plan_trace, lambda make: make()
    )
    for stage in made.program.stages:
        yield from (stage.forward.graph, stage.backward.graph, stage.weights.graph, stage.reduce)
        if stage.gather is not None:
            yield stage.gather.graph


def sizes(node: fx.Node) -> set[int]:
    """How many elements each operand and each result has."""
    values = [node.meta["val"], *(operand.meta["val"] for operand in node.all_input_nodes)]
    return {int(v.numel()) for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor)}


def sends_logits(graph: fx.Graph) -> list[fx.Node]:
    """Collectives of logits or their gradients."""
    return [n for n in graph.nodes if is_collective(n) and any(size % OF_LOGITS == 0 for size in sizes(n))]


@pytest.mark.parametrize(
    "pin",
    [
        {"cp": 2},
        {"tp": 2},
        {"cp": 2, "tp": 2},
        {"tp": 4, "sp": True},
        {"pp": 2, "tp": 2, "micro_batch": 2},
        {"pp": 2, "cp": 2, "micro_batch": 2},
    ],
    ids=lambda pin: "-".join(f"{role}{size}" for role, size in pin.items()),
)
def test_logits_stay_where_they_are_made(pin: dict[str, Any]) -> None:
    graphs = list(graphs_of(pin))
    assert any(is_collective(n) for graph in graphs for n in graph.nodes)
    assert not [n for graph in graphs for n in sends_logits(graph)]
    logits = [n.meta["val"].numel() for graph in graphs for n in graph.nodes if _is_logits(n)]
    whole = BATCH * SEQUENCE * VOCAB // (BATCH // pin.get("micro_batch", BATCH))
    assert logits and max(logits) <= whole // (pin.get("cp", 1) * pin.get("tp", 1))


def _is_logits(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() % OF_LOGITS == 0


@pytest.mark.parametrize(("shape", "seen"), [((48, 148), True), ((148, 64), False), ((48, 64), False)])
def test_a_gather_of_logits_is_seen(shape: tuple[int, int], seen: bool) -> None:
    builder = GraphBuilder((2,), FakeTensorMode())
    part = builder.local_input("x", torch.empty(shape), shape)
    builder.output([builder.all_gather(part, 0)])
    assert bool(sends_logits(builder.graph)) is seen
