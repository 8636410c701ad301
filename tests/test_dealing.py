"""Sequences that are dealt out once for a whole program: who has what, what moves, and what the user gets back."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import LlamaConfig, LlamaForCausalLM

import autopar
from autopar._torch_compat import FakeTensorMode, local_tensor
from autopar.codegen.builder import GraphBuilder
from autopar.codegen.steps import emit_path
from autopar.codegen.traffic import emitted_traffic, graph_traffic
from autopar.compare import cut, glue
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.dealing import fold_of
from autopar.placements import Fold, State, in_order, is_dealt, local_shape
from autopar.plans import Plan
from autopar.pricing import price
from autopar.redistribute import Conversions, ConversionTables
from autopar.rules.ring import RING
from autopar.runtime.execute import bind_groups
from autopar.runtime.ordering import OutputOrder
from autopar.sample import sample_values
from autopar.trace import Trace, trace
from autopar.traffic import planned_traffic, sent_bytes
from autopar.verification import Simulation, emit_for, relative_error, simulated_ranks, verify_program
from tests.models import VOCAB, ModelAndInputs, next_token_loss
from tests.parity.test_sequences import tiny_gemma3, tiny_gpt2

MESH, FOLD = (2, 2), Fold(32, 2, dealt=True)
CPU = autopar.ClusterSpec.preset("cpu", gpus=4)


# -- conversions -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 16, 4), (32, 4), (4, 16)])
def test_every_conversion_moves_what_it_says(shape: tuple[int, ...]) -> None:
    """To and from dealt states, on both axes of a mesh, against what each rank should hold; bytes as priced."""
    torch.manual_seed(0)
    whole = torch.randn(shape, dtype=torch.float64)
    table = ConversionTables(MESH, CostModel(CPU, MESH), FOLD).of(whole)
    pairs = [
        (source, target)
        for source, target in itertools.permutations(table.states, 2)
        if any(map(is_dealt, (*source, *target))) and "P" not in source and "P" not in target
    ]
    assert len({p for pair in pairs for s in pair for p in s if is_dealt(p)}) >= 1
    for source, target in pairs[:: max(1, len(pairs) // 60)]:
        graph = written(whole, table, source, target)
        expected = sum(sent_bytes(s.kind, s.nbytes, s.parts) for s in table.path(source, target))
        assert sum(graph_traffic(graph, MESH).values()) == expected, (source, target)
        with simulated_ranks(MESH) as (groups, coordinates):
            module = fx.GraphModule(nn.Module(), bind_groups(graph, groups))
            parts = local_tensor({rank: cut(whole, source, MESH, rank) for rank in range(4)})
            made = module(*coordinates, parts)
            found = [made._local_tensors[rank] for rank in range(4)]
        for rank, part in enumerate(found):
            assert torch.equal(part, cut(whole, target, MESH, rank)), (source, target, rank)


def written(whole: torch.Tensor, table: Conversions, source: State, target: State) -> fx.Graph:
    """The conversion on a rank."""
    builder = GraphBuilder(MESH, FakeTensorMode())
    shape = local_shape(whole.shape, source, MESH)
    assert shape is not None
    part = builder.local_input("x", whole, shape)
    builder.graph.output(emit_path(builder, part, table.path(source, target), keep_source_alive=True))
    return builder.graph


def test_a_sum_is_dealt_out() -> None:
    summands = [torch.randn(16, 4, dtype=torch.float64) for _ in range(4)]
    table = ConversionTables(MESH, CostModel(CPU, MESH), Fold(16, 1, dealt=True)).of(summands[0])
    for target in (("D(0)", "P"), ("D(0)", "S(1)"), ("R", "D(0)"), ("D(0)", "D(0)")):
        graph = written(summands[0], table, ("P", "P"), target)
        with simulated_ranks(MESH) as (groups, coordinates):
            module = fx.GraphModule(nn.Module(), bind_groups(graph, groups))
            made = module(*coordinates, local_tensor(dict(enumerate(summands))))
            parts = [made._local_tensors[rank] for rank in range(4)]
        assert relative_error(glue(parts, target, MESH), torch.stack(summands).sum(0)) < 1e-14


def test_who_gets_which_chunk() -> None:
    rows = torch.arange(16)
    assert [cut(rows, ("D(0)",), (4,), rank).tolist() for rank in range(4)] == [
        [0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]  # fmt: skip
    assert cut(rows, ("D(0/2)",), (2,), 1).tolist() == [2, 3, 4, 5, 10, 11, 12, 13]
    assert local_shape((12,), ("D(0)",), (4,)) is None  # three chunks of four ranks' eight
    assert in_order(("D(1)", "R", "S(0)")) == ("S(1)", "R", "S(0)")


# -- whole programs --------------------------------------------------------------------------


def six_heads() -> ModelAndInputs:
    """A Llama of 6 heads, which 4 ranks do not divide."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(config).double(), torch.randint(VOCAB, (2, 16))
    model.loss_function = next_token_loss
    return model, ((), {"input_ids": ids, "labels": ids.clone()})


@cache
def planned(ranks: int, axes: tuple[int, ...] | int) -> tuple[ModelAndInputs, Trace, Plan]:
    """`six_heads`, its trace and a plan."""
    model, call = six_heads()
    cluster = autopar.ClusterSpec.preset("cpu", gpus=ranks)
    return (model, call), trace(model, call), autopar.plan(model, cluster, example_inputs=call, pin={"cp": axes})


def test_a_plan_file_says_what_is_dealt_out() -> None:
    _, _, plan = planned(4, 4)
    again = Plan.loads(plan.dumps())
    assert '"autopar_plan": 4' in plan.dumps()
    assert again.decisions.nodes.keys() == plan.decisions.nodes.keys()
    assert again.decisions.dealt and again.decisions.outputs == plan.decisions.outputs


def test_nothing_but_keys_and_values_goes_around() -> None:
    """Bytes as planned, and they are those of the ring alone."""
    _, traced, plan = planned(4, 4)
    priced = price(traced, plan.decisions, CostModel(plan.cluster, plan.mesh), OptimizerSpec(plan.options.optimizer))
    sent = emitted_traffic(emit_for(traced, plan))
    assert sent == planned_traffic(priced, plan.mesh)
    key = next(n for n in traced.graph_module.graph.nodes if "flash_attention" in n.name).args[1].meta["val"]
    pair = 2 * key.numel() * key.element_size() // 4  # a rank's keys and values
    assert sent["permute", 0] == 3 * pair + 3 * pair + 3 * pair + pair  # forward; keys, gradients, and these home
    assert sent["all_to_all", 0] == 0


def test_results_come_in_the_order_of_the_model() -> None:
    """Logits are dealt out where the program ends, and put in order when they are handed out."""
    (model, call), traced, plan = planned(4, 4)
    emitted, values = emit_for(traced, plan), sample_values(traced, model, call, 0)
    logits = next(o.node for o in traced.outputs if o.node not in (None, traced.loss))
    assert any(map(is_dealt, emitted.output_states[logits]))
    order = OutputOrder(traced, plan, emitted.output_states)
    order.written(logits)  # not among simulated ranks, where messages of the writing would be sent
    with simulated_ranks(plan.mesh) as (groups, coordinates), torch.no_grad():
        simulation = Simulation(traced, plan.decisions, emitted, groups, coordinates)
        outputs, _ = simulation.program.forward(simulation.start(values))
        part = dict(zip(emitted.output_names, outputs, strict=False))[logits]
        made, state = order.put(simulation.program, logits, part)
        found = simulation.gather(made, state)
    assert state == ("S(1)",)
    assert relative_error(found, model(*call[0], **call[1]).logits) < 1e-9


@pytest.mark.parametrize("axes", [(2, 2)])
def test_a_ring_by_heads(axes: tuple[int, ...]) -> None:
    """Sequences on four ranks, two of which share heads: a ring of two, and heads scattered over two."""
    (model, call), traced, plan = planned(4, axes)
    assert plan.layout()["cp"] == 4
    rings = [d for d in plan.decisions.nodes.values() if any(r.lowering == RING for r in d.rules)]
    assert rings and all({r.inputs[0] for r in d.rules} == {"D(2)", "S(1)"} for d in rings)
    report = autopar.verify(model, plan, example_inputs=call)
    assert report.tolerance == 1e-9
    assert planned_traffic(
        price(traced, plan.decisions, CostModel(plan.cluster, plan.mesh), OptimizerSpec(plan.options.optimizer)),
        plan.mesh,
    ) == emitted_traffic(emit_for(traced, plan))


# -- what is not dealt out -------------------------------------------------------------------


class Running(nn.Module):
    """Causal attention, then running means along the sequence: an op that looks at the order."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(16, 48), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """x: [batch, sequence, width]."""
        parts = self.inner(x).chunk(3, -1)
        q, k, v = (p.unflatten(-1, (1, 16)).transpose(1, 2) for p in parts)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return nn.functional.cross_entropy(self.out(seen.cumsum(1)).flatten(0, 1), labels.flatten())


def test_what_looks_at_the_order_takes_it_in_order() -> None:
    torch.manual_seed(0)
    model = Running().double()
    call: Any = ((torch.randn(2, 16, 16, dtype=torch.float64), torch.randint(8, (2, 16))), {})
    plan = autopar.plan(model, CPU, example_inputs=call, pin={"cp": 4})
    states = [s for d in plan.decisions.nodes.values() for s in d.operand_states]
    assert any(is_dealt(p) for s in states for p in s)
    autopar.verify(model, plan, example_inputs=call)


def test_windows_and_random_numbers_stay_in_order() -> None:
    assert fold_of(planned(4, 4)[1]) == Fold(2 * 16, 2, dealt=True)
    gemma = fold_of(traced_of(tiny_gemma3()))
    assert gemma is not None and not gemma.dealt
    model, call = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    dropping = fold_of(traced_of((model.train(), call)))
    assert dropping is not None and not dropping.dealt


def traced_of(given: ModelAndInputs) -> Trace:
    return trace(*given)


def test_a_seeded_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks dealt from the same end: verify names an op."""
    from autopar.codegen import steps
    from autopar.errors import VerifyError

    (model, call), traced, plan = planned(4, 4)

    def wrong(x: torch.Tensor, dim: int, coord: int, parts: int) -> torch.Tensor:
        size = x.shape[dim] // parts
        return torch.ops.aten.slice.Tensor(x, dim, coord * size, coord * size + size)

    monkeypatch.setattr(steps, "own_chunks", wrong)
    with pytest.raises(VerifyError, match="differ"):
        verify_program(traced, plan.decisions, emit_for(traced, plan), sample_values(traced, model, call, 0))
