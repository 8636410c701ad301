"""What `benchmarks/throughput.py` concludes from the seconds of each round."""

from __future__ import annotations

import pytest

from benchmarks.throughput import SYNCHRONIZED, Ratio, show


def test_steps_of_one_round_are_compared() -> None:
    """A machine that grows three times slower says nothing about the variants."""
    ratio = Ratio.of([1.0, 2.0, 3.0, 3.0], [1.1, 2.2, 3.3, 3.0])
    assert ratio.median == pytest.approx(1.1)
    assert (ratio.low, ratio.high) == pytest.approx((1.075, 1.1))


@pytest.mark.parametrize(("target", "passed"), [(0.97, True), (0.99, False)])
def test_the_best_of_those_that_compute_the_same_decides(
    target: float, passed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, fast, slow = [1.0, 2.0], [0.5, 1.0], [0.98, 1.96]
    seconds = {"autopar": ours, "DDP": fast, "DDP" + SYNCHRONIZED: slow, "FSDP2" + SYNCHRONIZED: [3.0, 3.0]}
    assert show("2 ranks", seconds, 32, target) is passed
    out = capsys.readouterr().out
    assert "autopar / DDP + synchronized batch norm = 0.980 (0.980 to 0.980)" in out
    assert "autopar / DDP = 0.500 (0.500 to 0.500), which computes something else" in out
    assert ("BELOW" in out) is not passed
