"""Targets in words."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autopar.errors import AutoparError
from autopar.sizing.goal import COUNTED_STEPS, Goal
from autopar.sizing.target import Target, parse_target

DAY = 86400.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1T tokens in 30 days", {"amount": 1e12, "unit": "tokens", "duration_s": 30 * DAY}),
        ("300B tokens in 2 weeks", {"amount": 3e11, "unit": "tokens", "duration_s": 14 * DAY}),
        ("1.5 trillion tokens within 1 year", {"amount": 1.5e12, "unit": "tokens", "duration_s": 365 * DAY}),
        ("2e12 tokens in 36h", {"amount": 2e12, "unit": "tokens", "duration_s": 1.5 * DAY}),
        ("step in 2.5 s", {"step_s": 2.5}),
        ("a step within 800ms", {"step_s": 0.8}),
        ("1T tokens for 5M USD", {"amount": 1e12, "unit": "tokens", "budget_usd": 5e6}),
        ("300B tokens under $2M", {"amount": 3e11, "unit": "tokens", "budget_usd": 2e6}),
        ("1T tokens in 30 days under $5M",
         {"amount": 1e12, "unit": "tokens", "duration_s": 30 * DAY, "budget_usd": 5e6}),
        ("1T tokens under 5,000,000 dollars in 30 days",
         {"amount": 1e12, "unit": "tokens", "duration_s": 30 * DAY, "budget_usd": 5e6}),
        ("300M samples in 90 minutes", {"amount": 3e8, "unit": "samples", "duration_s": 5400.0}),
    ],
)  # fmt: skip
def test_what_is_understood(text: str, expected: dict[str, Any]) -> None:
    assert parse_target(text) == Target(text, **expected)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("soon", "it names neither tokens, samples nor a step"),
        ("", "it names neither tokens"),
        ("1T tokens", "it says neither in what time nor for how much"),
        ("step", "it does not say how long"),
        ("step in 2.5 s under $5", "a step has no budget"),
        ("1T tokens in 3 fortnights", "'fortnights' is no unit of time"),
        ("1T tokens in 30 days in 2 weeks", "'in 2 weeks' is a second limit"),
        ("1T tokens in 30 days please", "'please' is not understood"),
        ("1T tokens for 5M", "'for 5m' is not understood"),
        ("1T tokens under $5Mio", "is not understood"),
        ("0 tokens in 30 days", "0 is not a positive number"),
        ("-1T tokens in 30 days", "it names neither"),
        ("1T tokens in 0 days", "0 is not a positive number"),
        ("1e999 tokens in 30 days", "1e999 is not a positive number"),
    ],
)
def test_what_is_refused(text: str, why: str) -> None:
    with pytest.raises(AutoparError) as caught:
        parse_target(text)
    assert why in str(caught.value)
    assert '"1T tokens in 30 days"' in str(caught.value), "it says what is accepted"
    assert "\n" not in str(caught.value)


def test_a_goal_counts_whole_steps() -> None:
    goal = Goal.of(parse_target("1M tokens in 100 s"), global_batch=3, tokens=1000)
    assert goal.per_step == 3000
    assert goal.steps == 334
    assert goal.longest_step_s == 100 / 334
    assert goal.usd(36.0, 2.0) == pytest.approx(334 * 36 * 2 / 3600)
    step = Goal.of(parse_target("step in 2 s"), global_batch=3, tokens=1000)
    assert (step.steps, step.longest_step_s, step.unit) == (COUNTED_STEPS, 2.0, "tokens")
    assert math.isinf(step.budget_usd)


def test_samples_of_a_model_with_tokens_are_sequences() -> None:
    assert Goal.of(parse_target("1M samples in 1 day"), global_batch=8, tokens=1000).per_step == 8


def test_a_model_without_tokens_has_no_targets_in_tokens() -> None:
    with pytest.raises(AutoparError, match="say how many samples"):
        Goal.of(parse_target("1M tokens in 1 day"), global_batch=8, tokens=None)
