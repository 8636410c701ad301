"""Ring attention: when it is offered, which way keys go, and that its steps are the right ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx

from autopar import blockwise
from autopar.blockwise import Sight, ours, pieces
from autopar.codegen import ring
from autopar.cost.compute import op_flops
from autopar.rules import AxisRule, axis_rules
from autopar.rules.ring import RING, RING_BACKWARD
from tests.rules.attention_cases import FUSED, fused
from tests.rules.harness import case, check

NUMBERS = torch.randn(1, 4, 32, 4, dtype=torch.float64)


def rings(node: fx.Node, size: int) -> list[AxisRule]:
    """The rules that go around."""
    return [rule for rule in axis_rules(node, size).rules if rule.lowering in (RING, RING_BACKWARD)]


def windowed(window: int) -> fx.Node:
    """Attention over the last `window` keys."""
    return case(ours.block_attention.default, NUMBERS, NUMBERS, NUMBERS, None, [0], [0], True, window, None)


def test_both_passes_go_around_any_axis_that_divides() -> None:
    for causal in (True, False):
        for node in fused((1, 4, 32, 4), (1, 2, 32, 4), causal=causal):
            assert [len(rings(node, size)) for size in (2, 4, 8)] == [1, 1, 1]
            assert len(rings(node, 16)) == 1
            assert len(rings(node, 32)) == (not causal)  # two chunks a rank
            assert not rings(node, 3)


def test_not_where_queries_and_keys_differ_or_numbers_are_drawn() -> None:
    assert not any(rings(node, 2) for node in fused((1, 4, 32, 4), (1, 4, 16, 4)))
    q = NUMBERS
    out = case(FUSED, q, q, q, 0.0, True)
    assert rings(out, 2)
    out.args = (*out.args[:3], 0.5, True)
    assert not rings(out, 2)


@pytest.mark.parametrize(("window", "hops"), [(1, 0), (2, 1), (8, 1), (9, 1), (10, 2), (17, 2), (18, 3), (32, 3)])
def test_keys_travel_as_far_as_the_window_reaches(window: int, hops: int) -> None:
    (rule,) = rings(windowed(window), 4)  # 8 tokens a rank
    assert [c.times for c in rule.collectives if c.kind == "permute"] == [hops]


def test_a_ring_on_two_axes_is_refused() -> None:
    from autopar.rules import compatible

    (rule,) = rings(case(FUSED, NUMBERS, NUMBERS, NUMBERS, 0.0, True), 2)
    assert not compatible((rule, rule), (2, 2))
    assert compatible((rule, AxisRule(("S(1)",) * 3, ("S(1)",) * 2)), (2, 2))


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_dealt_out_chunks_balance(parts: int) -> None:
    assert sorted(ring.dealt_to(parts, 0)) == sorted(ring.dealt_to(parts, 1)) == list(range(parts))
    for rank in range(parts):
        even, odd = ring.even_chunk(rank, parts), ring.odd_chunk(rank, parts)
        assert {even, odd} == {rank, 2 * parts - 1 - rank}
        assert even % 2 == 0
        assert ring.dealt_to(parts, 0)[even // 2] == ring.dealt_to(parts, 1)[odd // 2] == rank


@pytest.mark.parametrize("order", [ring.Order.EXCHANGED, ring.Order.DEALT])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_every_rank_has_the_same_work_at_every_hop(parts: int, order: ring.Order) -> None:
    length = 64

    def scores(rank: int, hop: int) -> int:
        starts = [ring.starts_of(rank, h, parts, length, order) for h in (0, hop)]
        total = 0
        for piece in pieces(*starts, (length, length), is_causal=True, window=0):
            height, width = piece.rows[1] - piece.rows[0], piece.columns[1] - piece.columns[0]
            total += height * width if piece.sight is Sight.FULL else height * (height + 1) // 2
        return total

    for hop in range(parts):
        assert len({scores(rank, hop) for rank in range(parts)}) == 1
    whole = length * parts
    assert sum(scores(0, hop) for hop in range(parts)) * parts == whole * (whole + 1) // 2


def test_a_window_counts_what_it_shows() -> None:
    (query, *rest) = (NUMBERS,) * 3
    seen = sum(min(i + 1, 5) for i in range(32))
    args = (query, *rest, None, [0], [0], True, 5, None)
    assert op_flops(ours.block_attention.default, args, {}, None) == 4 * 4 * 4 * seen


# -- wrong rings -----------------------------------------------------------------------------


def checked(nodes: list[fx.Node], size: int = 4) -> None:
    for node in nodes:
        for rule in rings(node, size):
            check(node, (rule,), (size,))


def test_the_wrong_order_of_blocks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = list(fused((1, 2, 16, 4), (1, 2, 16, 4), causal=True))
    checked(nodes)
    right = ring.starts_of
    monkeypatch.setattr(ring, "starts_of", lambda coord, hop, *rest: right(coord, -hop, *rest))
    with pytest.raises(AssertionError, match="off by"):
        checked(nodes)


def test_a_missing_rescale_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [next(iter(fused((1, 2, 16, 4), (1, 2, 16, 4))))]
    checked(nodes)

    def unscaled(out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor) -> None:
        out += more
        torch.logaddexp(lse, more_lse, out=lse)

    monkeypatch.setattr(blockwise, "_merge", unscaled)
    with pytest.raises(AssertionError, match="off by"):
        checked(nodes)


def test_a_message_to_the_wrong_rank_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = list(fused((1, 2, 16, 4), (1, 2, 16, 4)))
    monkeypatch.setattr(ring, "around", lambda parts: tuple((r + 2) % parts for r in range(parts)))
    with pytest.raises(AssertionError, match="off by"):
        checked(nodes)


def test_rules_are_data() -> None:
    (rule,) = rings(windowed(4), 2)
    assert replace(rule, collectives=()).inputs == ("S(2)", "S(2)", "S(2)")
