"""The specification of rules: an op lowered by its rules on all ranks equals the op run whole."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from autopar.rules import AxisRule, axis_rules
from autopar.rules.admitted import ADMITTED
from autopar.rules.custom import CUSTOM
from autopar.rules.linear import LINEAR
from tests.rules import graphs
from tests.rules.cases import GROUPS, aten, randn
from tests.rules.harness import by_groups, case, check, rule_pairs, sampled
from tests.rules.image_cases import narrow_batch_norms

PAIRS_PER_OP = 12
# No CPU kernel, and no decomposition to stand in for one: the rules are those of the CPU sister.
CUDA_ONLY = {
    f"aten._scaled_dot_product_{kernel}_attention{pass_}"
    for kernel in ("flash", "efficient", "cudnn")
    for pass_ in ("", "_backward")
}


def single_ops(group: str) -> list[fx.Node]:
    torch.manual_seed(0)
    return list(GROUPS[group]())


def check_all(nodes: list[fx.Node]) -> None:
    torch.manual_seed(1)
    for node in nodes:
        for size in (2, 4):
            for rule in axis_rules(node, size).rules:
                if not by_groups(rule):
                    check(node, (rule,), (size,))
        for pair in sampled(list(rule_pairs(node, (2, 2))), PAIRS_PER_OP):
            check(node, pair, (2, 2))


@pytest.mark.parametrize("group", GROUPS)
def test_single_ops(group: str) -> None:
    nodes = single_ops(group)
    assert all(axis_rules(node, 2).known for node in nodes), "every op made by hand has rules"
    check_all(nodes)


@pytest.mark.parametrize("name", graphs.NAMES)
def test_ops_of_models(name: str) -> None:
    check_all(list(graphs.recorded(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", graphs.MORE_NAMES)
def test_ops_of_other_families(name: str) -> None:
    nodes = list(graphs.recorded(name))
    assert {str(node.target) for node in nodes if not axis_rules(node, 2).known} == set()
    check_all(nodes)


@pytest.mark.parametrize("name", graphs.NAMES)
def test_every_op_of_the_models_has_rules(name: str) -> None:
    unknown = {str(node.target) for node in graphs.recorded(name) if not axis_rules(node, 2).known}
    assert unknown == set()


def test_every_op_with_rules_is_run() -> None:
    run = {str(node.target.overloadpacket) for group in GROUPS for node in single_ops(group)}
    assert (ADMITTED | set(CUSTOM) | set(LINEAR)) - CUDA_ONLY - run == set()


def test_pairs_of_different_axis_sizes() -> None:
    torch.manual_seed(2)
    nodes = [node for group in ("losses", "softmaxes", "embeddings") for node in single_ops(group)]
    for node in sampled(nodes, 25):
        for pair in sampled(list(rule_pairs(node, (4, 2))), 6):
            check(node, pair, (4, 2))


def test_batch_norm_in_mixed_precision() -> None:
    """Summands in bfloat16 round too much to compare, so only the rules with lowerings of their own are run."""
    torch.manual_seed(0)
    for node in narrow_batch_norms():
        rules = [rule for rule in axis_rules(node, 4).rules if rule.lowering != "local"]
        assert rules
        for rule in rules:
            check(node, (rule,), (4,))


def test_a_wrong_rule_is_caught() -> None:
    """The harness itself: rules that look right but are not must fail."""
    torch.manual_seed(0)
    wrong = [
        (case(aten.add.Scalar, randn(4, 8), 1.0), AxisRule(("P",), ("P",))),
        (case(aten._softmax.default, randn(4, 8), 1, False), AxisRule(("S(1)",), ("S(1)",))),
        (case(aten.mean.dim, randn(4, 8), [0]), AxisRule(("S(0)",), ("P",))),
        (case(aten.mul.Tensor, randn(4, 8), randn(4, 8)), AxisRule(("P", "P"), ("P",))),
        (case(aten.cumsum.default, randn(4, 8), 0), AxisRule(("S(0)",), ("S(0)",))),
        (case(aten.sum.dim_IntList, randn(4, 8), [0]), AxisRule(("S(0)",), ("R",))),
    ]
    for node, rule in wrong:
        with pytest.raises(AssertionError):
            check(node, (rule,), (2,))
