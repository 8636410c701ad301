"""How far predictions are from measurements: errors, rank correlation, fit, and the choice of a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.published_rows import Case


@dataclass(frozen=True)
class Outcome:
    """A case and what was predicted of it. problem: why there is no prediction; refused: that the layout cannot be.

    memory_bytes: of the worst rank, by what holds it.
    """

    case: Case
    step_s: float | None = None
    peak_bytes: float | None = None
    fits: bool = False
    memory_bytes: tuple[tuple[str, float], ...] = ()
    problem: str | None = None
    refused: bool = False

    @property
    def error(self) -> float | None:
        """Relative error of the step time; positive: predicted slower than measured."""
        return relative(self.step_s, self.case.step_s)

    @property
    def peak_error(self) -> float | None:
        """Relative error of the peak memory."""
        return relative(self.peak_bytes, self.case.peak_bytes)


@dataclass(frozen=True)
class Check:
    """A figure against what it has to be. least: whether the target is a lower limit."""

    name: str
    value: float
    target: float
    least: bool = False

    @property
    def ok(self) -> bool:
        """Whether the target is met; a figure that is not a number is not."""
        return self.value >= self.target if self.least else self.value <= self.target

    def __str__(self) -> str:
        """One line of the report."""
        sign = "at least" if self.least else "at most"
        word = "" if self.ok else "   BEYOND"
        return f"{self.name:<58} {self.value:8.3f}   {sign} {self.target:g}{word}"


def relative(predicted: float | None, measured: float | None) -> float | None:
    """Predicted over measured, less 1; None where one is not known."""
    return None if predicted is None or measured is None else predicted / measured - 1


def sizes(outcomes: Sequence[Outcome], error: Callable[[Outcome], float | None]) -> np.ndarray:
    """The sizes of the errors that are known."""
    found = [error(o) for o in outcomes]
    return np.array([abs(e) for e in found if e is not None])


def quantile(values: np.ndarray, share: float) -> float:
    """A quantile; NaN of nothing."""
    return float(np.quantile(values, share)) if len(values) else float("nan")


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation, ties sharing their mean rank; NaN with fewer than two pairs or where one side is constant."""
    a, b = _ranks(np.asarray(left)), _ranks(np.asarray(right))
    if len(a) < 2 or not a.std() or not b.std():
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


@dataclass(frozen=True)
class Cell:
    """One model on one number of nodes: how well the runs of a sweep are predicted.

    finished, failed: runs. spearman: of tokens/s. choice: throughput of the layout predicted best among the finished
    ones, over that of the best measured. ran_fits, failed_refused: shares. failed_choice: whether the layout predicted
    best among all tried is one that failed.
    """

    name: str
    finished: int
    failed: int
    median_error: float
    spearman: float
    median_peak_error: float
    choice: float
    ran_fits: float
    failed_refused: float
    failed_choice: bool


def cells(outcomes: Sequence[Outcome]) -> list[Cell]:
    """The cells of a sweep, in the order of their first runs."""
    names = list(dict.fromkeys(o.case.source for o in outcomes))
    return [_cell(name, [o for o in outcomes if o.case.source == name]) for name in names]


def _cell(name: str, outcomes: list[Outcome]) -> Cell:
    finished = [o for o in outcomes if o.case.ran]
    failed = [o for o in outcomes if not o.case.ran]
    priced = [o for o in finished if o.step_s is not None]
    best = max(map(_measured_rate, finished))
    chosen = max(priced, key=_predicted_rate, default=None)
    possible = [o for o in outcomes if o.fits]
    pick = max(possible, key=_predicted_rate, default=None)
    return Cell(
        name=name,
        finished=len(finished),
        failed=len(failed),
        median_error=quantile(sizes(finished, rate_error), 0.5),
        spearman=spearman([_predicted_rate(o) for o in priced], [_measured_rate(o) for o in priced]),
        median_peak_error=quantile(sizes(finished, lambda o: o.peak_error), 0.5),
        choice=float("nan") if chosen is None else _measured_rate(chosen) / best,
        ran_fits=float(np.mean([o.fits for o in finished])),
        failed_refused=float(np.mean([not o.fits for o in failed])) if failed else float("nan"),
        failed_choice=pick is not None and not pick.case.ran,
    )


def rate_error(outcome: Outcome) -> float | None:
    """Relative error of tokens/s."""
    return relative(outcome.case.step_s, outcome.step_s)


def _predicted_rate(outcome: Outcome) -> float:
    assert outcome.step_s is not None
    return outcome.case.global_batch / outcome.step_s


def _measured_rate(outcome: Outcome) -> float:
    assert outcome.case.step_s is not None
    return outcome.case.global_batch / outcome.case.step_s
