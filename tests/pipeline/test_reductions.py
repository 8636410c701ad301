"""What a stage does when its micro-batches are done: gradients of many parameters are summed by few messages."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import autopar
import autopar.api
from autopar.codegen.builder import is_collective
from autopar.codegen.stage_nodes import stages_by_blocks
from autopar.codegen.stages import emit_stages
from autopar.cost.model import CostModel
from autopar.trace import trace
from tests.models import tiny_llama
from tests.pipeline.staged import Cut, Whole, staged

MESH = (2,)


class Alone(CostModel):
    """Each gradient by a message of its own."""

    bucket_bytes = 0


def messages(cut: Cut) -> list[int]:
    """How many collectives end the step of each stage."""
    return [sum(is_collective(n) for n in stage.reduce.nodes) for stage in cut.program.stages]


def test_gradients_of_a_stage_travel_together(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = staged(Whole.of(*tiny_llama(layers=2)), [1, 1], MESH, 2, monkeypatch, pin={"dp": 2, "zero": 0})
    nodes = stages_by_blocks(cut.traced, [1, 1])
    alone = emit_stages(cut.traced, cut.plan.decisions, MESH, Alone(cut.plan.cluster, MESH), nodes)
    one_by_one = [Counter(is_collective(n) for n in stage.reduce.nodes)[True] for stage in alone.stages]
    assert all(few < many for few, many in zip(messages(cut), one_by_one, strict=True))
    assert max(messages(cut)) <= 2
    cut.verify("1f1b", 2)


def test_a_tied_gradient_under_autocast_is_sent_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its summands are cast to float32 on their way, and are apart all the same: no message is as large as they are."""
    model, call = tiny_llama(torch.float32, layers=2, tied=True)
    traced = trace(model, call, precision="bf16")
    monkeypatch.setattr(autopar.api, "trace", lambda *_, **__: traced)
    plan = autopar.plan(model, autopar.ClusterSpec.preset("h100-sxm", gpus=1), example_inputs=call, precision="bf16")
    costs = CostModel(plan.cluster, ())
    stages = emit_stages(traced, plan.decisions, (), costs, stages_by_blocks(traced, [1, 1])).stages
    table = next(p for p in traced.params if p.fqn == "model.embed_tokens.weight")
    assert all(table.fqn in (*stage.grads_early, *stage.grads_late) for stage in stages)
    sent = [t for stage in stages for t in stage.sends_backward.tensors]
    assert sent and all(t.shape != table.shape for t in sent)
