"""What rules look like: contents that matter to plans, order, memo, refusals."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch._subclasses import FakeTensorMode

from autopar.codegen.lowerings import LOWERINGS, lower
from autopar.errors import PlanError
from autopar.rules import AxisRule, axis_rules, compatible, is_random, is_view, operands, results
from autopar.rules.random import IN_PARTS
from autopar.rules.schema import op_call
from tests.rules.cases import GROUPS, aten, ints, mask, randn, randoms
from tests.rules.harness import Context, case


def table(node: fx.Node, size: int = 2) -> set[tuple[str, str]]:
    """Rules as ("inputs", "outputs"), blank-separated."""
    return {(" ".join(rule.inputs), " ".join(p or "-" for p in rule.outputs)) for rule in axis_rules(node, size).rules}


def test_matrix_product_has_rows_columns_contraction_and_summands() -> None:
    assert table(case(aten.mm.default, randn(4, 8), randn(8, 16))) == {
        ("R R", "R"),
        ("S(0) R", "S(0)"),
        ("R S(1)", "S(1)"),
        ("S(1) S(0)", "P"),
        ("P R", "P"),
        ("R P", "P"),
    }


def test_the_replicated_rule_comes_first() -> None:
    for group in GROUPS.values():
        for node in group():
            first = axis_rules(node, 2).rules[0]
            assert set(first.inputs) <= {"R"}
            assert set(first.outputs) <= {"R", None}
            assert first.lowering == "local"


def test_embedding_by_vocabulary_hidden_and_batch() -> None:
    node = case(aten.embedding.default, randn(16, 8), ints(16, 4, 8))
    assert table(node) == {
        ("R R", "R"),
        ("R S(0)", "S(0)"),
        ("R S(1)", "S(1)"),
        ("S(1) R", "S(2)"),
        ("S(0) R", "P"),
        ("P R", "P"),
    }
    lowerings = {rule.inputs: rule.lowering for rule in axis_rules(node, 2).rules}
    assert lowerings["S(0)", "R"] == "vocab_embedding"
    assert set(lowerings.values()) == {"local", "vocab_embedding"}


def test_inner_collectives_are_declared() -> None:
    node = case(aten._log_softmax.default, randn(4, 16), 1, False)
    (rule,) = [r for r in axis_rules(node, 2).rules if r.lowering == "vocab_log_softmax"]
    assert [(c.kind, c.tensor, c.reduced_dims) for c in rule.collectives] == [("all_reduce", ("out", 0), (1,))] * 2


@pytest.mark.parametrize(
    ("node", "forbidden"),
    [
        (lambda: case(aten.add.Tensor, randn(4, 8), 1.0), ("P", "P")),
        (lambda: case(aten.mul.Tensor, randn(4, 8), randn(4, 8)), ("P P", "P")),
        (lambda: case(aten.pow.Tensor_Scalar, randn(4, 8), 2), ("P", "P")),
        (lambda: case(aten.relu.default, randn(4, 8)), ("P", "P")),
        (lambda: case(aten._to_copy.default, randn(4, 8), dtype=torch.float32), ("P", "P")),
        (lambda: case(aten._to_copy.default, randn(4, 8), dtype=torch.int64), ("P", "P")),
        (lambda: case(aten.masked_fill.Scalar, randn(4, 8), mask(4, 8), 1.0), ("P R", "P")),
        (lambda: case(aten.masked_fill.Scalar, randn(4, 8), mask(4, 8), 0.0), ("P P", "P")),
        (lambda: case(aten.cumsum.default, randn(4, 8), 1), ("S(1)", "S(1)")),
        (lambda: case(aten.slice.Tensor, randn(4, 8), 1, 0, 4), ("S(1)", "S(1)")),
        (lambda: case(aten.slice_backward.default, randn(4, 4), [4, 8], -1, 0, 4, 1), ("S(1)", "S(1)")),
        (lambda: case(aten.expand.default, randn(4, 1), [4, 8]), ("S(1)", "S(1)")),
        (lambda: case(aten.view.default, randn(6, 4), [3, 8]), ("S(0)", "S(0)")),
        (lambda: case(aten.cat.default, [randn(4, 8), randn(4, 8)], 1), ("S(1) S(1)", "S(1)")),
        (lambda: case(aten.gather.default, randn(8, 8), 1, ints(8, 4, 8)), ("S(0) S(0)", "S(0)")),
        (lambda: case(aten.tril.default, randn(8, 8)), ("S(0)", "S(0)")),
        (lambda: case(aten.amax.default, randn(4, 8), [0]), ("S(0)", "P")),
        (lambda: case(aten.sum.default, ints(4, 8, 4)), ("S(0)", "P")),
    ],
)
def test_traps(node, forbidden) -> None:
    rules = table(node())
    assert forbidden not in rules
    assert rules, "there is always a rule"


def test_only_shards_that_divide() -> None:
    node = case(aten.relu.default, randn(6, 4))
    assert table(node, 2) == {("R", "R"), ("S(0)", "S(0)"), ("S(1)", "S(1)")}
    assert table(node, 3) == {("R", "R"), ("S(0)", "S(0)")}
    assert table(node, 4) == {("R", "R"), ("S(1)", "S(1)")}
    assert table(node, 1) == table(node, 5) == {("R", "R")}


def test_random_ops_run_whole_or_in_parts() -> None:
    for node in randoms():
        found = axis_rules(node, 2)
        assert found.known
        assert is_random(op_call(node))
        whole, *parts = found.rules
        assert whole.lowering == "local" and {p.lowering for p in parts} <= {"draw"}
        name = str(node.target.overloadpacket)
        assert len(parts) == (len(results(node)[0].shape) if name in IN_PARTS else 0), name
    assert {str(node.target.overloadpacket) for node in randoms()} >= IN_PARTS


def test_dropout_that_drops_nothing_is_an_elementwise_op() -> None:
    node = case(aten.native_dropout.default, randn(4, 8), 0.0, True)
    assert not is_random(op_call(node))
    assert ("S(0)", "S(0) S(0)") in table(node)


def test_unknown_ops_run_replicated_and_are_reported() -> None:
    node = case(aten.linalg_inv_ex.default, torch.eye(4))
    found = axis_rules(node, 2)
    assert not found.known
    assert found.rules == (AxisRule(("R",), ("R", "R")),)


def test_ops_written_in_python_run_replicated() -> None:
    node = case(torch.special.entr, torch.rand(4, 8))
    assert axis_rules(node, 2).rules == (AxisRule(("R",), ("R",)),)
    assert not axis_rules(node, 2).known


def test_view_rules_are_a_function_of_the_operand() -> None:
    for node in GROUPS["views"]():
        if is_view(node.target):
            inputs = [rule.inputs for rule in axis_rules(node, 2).rules]
            assert len(set(inputs)) == len(inputs)


def test_what_is_a_view() -> None:
    views = (aten.view.default, aten._unsafe_view.default, aten.slice.Tensor, aten.t.default, aten.split.Tensor)
    others = (aten.clone.default, aten.add_.Tensor, aten.relu.default, aten.as_strided.default, aten.zeros.default)
    assert all(is_view(op) for op in views)
    assert not any(is_view(op) for op in others)


def test_operands_and_results_in_schema_order() -> None:
    x, index = randn(4, 8), ints(4, 4)
    node = case(aten.index.Tensor, x, [None, index])
    assert [n.meta["val"] for n in operands(node)] == [x, index]
    masked = case(
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        *(randn(4, 4, 8, 4) for _ in range(3)),
        attn_mask=randn(8, 8),
    )
    assert [tuple(n.meta["val"].shape) for n in operands(masked)] == [(4, 4, 8, 4)] * 3 + [(8, 8)]
    _, mean, rstd = aten.native_layer_norm(randn(4, 8), [8], None, None, 1e-5)
    arguments = (randn(4, 8), randn(4, 8), [8], mean, rstd, None, None, [True, False, False])
    grads = results(case(aten.native_layer_norm_backward.default, *arguments))
    assert [g is None for g in grads] == [False, True, True]


def test_rules_are_memoised_by_what_they_depend_on() -> None:
    one = case(aten.mul.Tensor, randn(4, 8), 1)
    same = case(aten.mul.Tensor, randn(4, 8), 1)
    other = case(aten.mul.Tensor, randn(4, 8), 1.0)
    transposed = case(aten.mul.Tensor, randn(8, 4).t(), 1)
    assert axis_rules(one, 2) is axis_rules(same, 2)
    assert axis_rules(one, 2) is not axis_rules(other, 2)
    assert axis_rules(one, 2) is not axis_rules(transposed, 2)
    assert axis_rules(one, 2) is not axis_rules(one, 4)


def test_no_process_group_is_made() -> None:
    before = dist.is_initialized()
    with FakeTensorMode():
        axis_rules(case(aten.bmm.default, torch.empty(4, 8, 12), torch.empty(4, 12, 20)), 2)
    assert dist.is_initialized() == before


def test_lowerings_that_exclude_each_other() -> None:
    node = case(aten.embedding.default, randn(16, 8), ints(16, 4, 8))
    vocab = next(r for r in axis_rules(node, 2).rules if r.lowering == "vocab_embedding")
    other = AxisRule(("R", "R"), ("R",), "mean_partial")
    assert compatible((vocab, vocab), (2, 2))
    assert not compatible((vocab, other), (2, 2))
    ctx = Context((2, 2))
    with pytest.raises(PlanError, match="mean_partial and vocab_embedding at once"):
        lower(ctx, node, (vocab, other), [ctx.graph.placeholder("w"), ctx.graph.placeholder("i")])


def test_groups_of_a_convolution_are_not_cut_through() -> None:
    options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 4)
    node = case(aten.convolution.default, randn(4, 16, 4, 4), randn(16, 4, 3, 3), None, *options)
    by_group = AxisRule(("S(1)", "S(0)"), ("S(1)",), units=4)
    assert by_group in axis_rules(node, 4).rules
    assert not [rule for rule in axis_rules(node, 8).rules if rule.units]
    assert compatible((by_group, by_group), (2, 2))
    assert not compatible((by_group, by_group), (4, 2))
    ctx = Context((4, 2))
    with pytest.raises(PlanError, match="4 groups, which 8 parts do not divide"):
        lower(ctx, node, (by_group, by_group), [ctx.graph.placeholder("x"), ctx.graph.placeholder("w")])


def test_batch_norm_declares_what_it_exchanges() -> None:
    arguments = (randn(4, 8, 4, 4), randn(8), randn(8), randn(8), randn(8), True, 0.1, 1e-5)
    node = case(aten._native_batch_norm_legit_functional.default, *arguments)
    by_batch = next(r for r in axis_rules(node, 2).rules if r.inputs[0] == "S(0)")
    assert by_batch.lowering == "batch_norm"
    assert [(c.kind, c.tensor, c.copies) for c in by_batch.collectives] == [("all_reduce", ("out", 1), 2)]
    ctx = Context((2,))
    lower(ctx, node, (by_batch,), [ctx.graph.placeholder("x") for _ in range(5)])
    assert sum("all_reduce" in n.meta for n in ctx.graph.nodes) == 1


def test_lower_refuses_what_does_not_fit() -> None:
    node = case(aten.relu.default, randn(4, 8))
    ctx = Context((2,))
    with pytest.raises(PlanError, match="needs 1 operands, and one rule for each of 1 mesh axes"):
        lower(ctx, node, axis_rules(node, 2).rules[:2], [ctx.graph.placeholder("x")])
    view = case(aten.view.default, randn(4, 8), [32])
    with pytest.raises(PlanError, match=r"\(32,\) does not divide as \('S\(0\)',\) on mesh \(3,\)"):
        lower(Context((3,)), view, (AxisRule(("S(0)",), ("S(0)",)),), [ctx.graph.placeholder("x")])


def test_as_strided_reads_only_its_operand() -> None:
    node = case(aten.as_strided.default, randn(8, 8)[:, :4], [4], [1], 0)
    ctx = Context((2,))
    with pytest.raises(PlanError, match="reads memory outside"):
        lower(ctx, node, axis_rules(node, 2).rules, [ctx.graph.placeholder("x")])


def test_every_lowering_named_by_a_rule_exists_and_is_named() -> None:
    groups = (*GROUPS.values(), randoms)
    named = {rule.lowering for group in groups for node in group() for rule in axis_rules(node, 2).rules}
    named.add("expert_rows")  # of ops between moves to groups and back: tests/parity/test_expert_parallel.py
    assert named == set(LOWERINGS)


def test_getitem_is_left_to_the_planner() -> None:
    graph = fx.Graph()
    pair = graph.placeholder("pair")
    pair.meta["val"] = (randn(4), randn(4))
    item = graph.call_function(operator.getitem, (pair, 0))
    item.meta["val"] = randn(4)
    assert operands(item) == ()
    assert not axis_rules(item, 2).known
