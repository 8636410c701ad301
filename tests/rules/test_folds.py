"""Dims that hold several sequences in a row: cut run by run, the same numbers come out."""

from __future__ import annotations

import itertools

import pytest
import torch

from autopar.compare import coordinates_of, cut, glue
from autopar.placements import Fold, local_shape, shard_runs
from autopar.redistribute import enumerate_states
from autopar.rules import AxisRule, axis_rules, compatible, operands, results
from tests.rules.cases import GROUPS, aten, randn
from tests.rules.harness import by_groups, case, check, sampled

FOLDS = (Fold(8, 2), Fold(16, 4), Fold(32, 4))
DEALT = (Fold(8, 2, dealt=True), Fold(16, 1, dealt=True), Fold(32, 4, dealt=True))
PAIRS_PER_OP = 4


def more_rules(node: torch.fx.Node, size: int, fold: Fold) -> list[AxisRule]:
    """The rules that only a fold gives, but those that take several ops to show."""
    plain = set(axis_rules(node, size).rules)
    return [rule for rule in axis_rules(node, size, fold).rules if rule not in plain and not by_groups(rule)]


@pytest.mark.parametrize("group", GROUPS)
def test_every_rule_of_a_fold_is_sound(group: str) -> None:
    torch.manual_seed(0)
    for node in GROUPS[group]():
        for fold in (*FOLDS, *DEALT):
            more = more_rules(node, 2, fold)
            for rule in more:
                check(node, (rule,), (2,))
            pairs = [p for p in itertools.product(axis_rules(node, 2).rules, more) if divide(node, p)]
            for pair in sampled(pairs, PAIRS_PER_OP):
                check(node, pair, (2, 2))


def divide(node: torch.fx.Node, pair: tuple[AxisRule, AxisRule]) -> bool:
    tensors = [*(n.meta["val"] for n in operands(node)), *results(node)]
    states = zip(*((*r.inputs, *r.outputs) for r in pair), strict=True)
    fits = all(t is None or local_shape(t.shape, s, (2, 2)) for t, s in zip(tensors, states, strict=True))
    return fits and compatible(pair, (2, 2))


def test_a_model_flattens_and_unflattens_sequences() -> None:
    fold = Fold(24, 2)
    flat = case(aten.view.default, randn(2, 12, 8), [24, 8])
    heads = case(aten.view.default, randn(24, 8), [2, 12, 4, 2])
    product = case(aten.mm.default, randn(24, 8), randn(8, 4))
    gradient = case(aten.mm.default, randn(8, 24), randn(24, 4))
    assert AxisRule(("S(1)",), ("S(0/2)",)) in more_rules(flat, 2, fold)
    assert AxisRule(("S(0/2)",), ("S(1)",)) in more_rules(heads, 2, fold)
    assert AxisRule(("S(0/2)", "R"), ("S(0/2)",)) in more_rules(product, 2, fold)
    assert AxisRule(("S(1/2)", "S(0/2)"), ("P",)) in more_rules(gradient, 2, fold)
    assert not more_rules(product, 5, fold)  # a sequence of 12 has no five equal parts


def test_a_cut_between_runs_and_one_inside_go_together() -> None:
    mesh, fold = (2, 3), Fold(24, 4)
    whole = torch.arange(24)
    for state in enumerate_states((24,), mesh, partial=False, fold=fold):
        parts = [cut(whole, state, mesh, rank) for rank in range(6)]
        assert torch.equal(glue(parts, state, mesh), whole)
        assert {tuple(part.shape) for part in parts} == {local_shape((24,), state, mesh)}
    state = ("S(0)", "S(0/4)")
    for rank in range(6):
        outer, inner = coordinates_of(rank, mesh)
        expected = whole.view(2, 2, 3, 2)[outer, :, inner].reshape(-1)
        assert torch.equal(cut(whole, state, mesh, rank), expected)
        assert torch.equal(cut(whole, state[::-1], mesh[::-1], inner * 2 + outer), expected)


@pytest.mark.parametrize("state", [("S(0/4)", "S(0/2)"), ("S(0)", "S(0/3)"), ("S(0/8)", "R")])
def test_what_does_not_divide_is_refused(state: tuple[str, ...]) -> None:
    assert local_shape((24,), state, (2, 2)) is None


def test_placements_name_their_runs() -> None:
    assert [shard_runs(p) for p in ("R", "P", "S(3)", "S(0/8)")] == [1, 1, 1, 8]
