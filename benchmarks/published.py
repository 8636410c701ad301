"""Predictions against published measurements: step time, memory, fit, and the choice of a layout.

    python benchmarks/published.py                      # everything; exits with 1 beyond the targets below
    python benchmarks/published.py training memory      # parts: training, memory, sweep, choices
    python benchmarks/published.py --json rows.json     # every row: measured, predicted, error

Needs no GPU. The measurements and their sources are in `benchmarks/data`. No constant of autopar belongs to one of
these rows: what a layout takes follows from a trace of the model and from figures of the hardware.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, too

from autopar.errors import AutoparError, LayoutError
from benchmarks import choices
from benchmarks.published_figures import Check, Outcome, cells, quantile, rate_error, relative, sizes
from benchmarks.published_models import build, cluster_of, layout_of_case, run_of_case
from benchmarks.published_rows import Case, Skipped, memory_cases, sweep_cases, training_cases

# Relative errors and shares that the project asks of itself.
KORTHIKANTI_MEAN, KORTHIKANTI_MOST = 0.03, 0.06
MEMORY_MOST = 0.03
TRAINING_MEDIAN, TRAINING_P90 = 0.07, 0.18
SWEEP_MEDIAN, SWEEP_SPEARMAN, SWEEP_PEAK = 0.12, 0.90, 0.05
RAN_FITS, FAILED_REFUSED = 0.98, 0.75
CHOICE_MEDIAN, CHOICE_LEAST = 0.95, 0.88

PARTS = ("training", "memory", "sweep", "choices")
Predict = Callable[..., Any]
Say = Callable[[str], None]


def predict_all(cases: Sequence[Case], predict: Predict, say: Say = lambda text: None) -> list[Outcome]:
    """What `predict` says of the cases, in their order: one call for each model, machine, batch and way to run."""
    outcomes: dict[str, Outcome] = {}
    groups: dict[Any, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.dims, case.machine, case.global_batch, case.run), []).append(case)
    began = time.perf_counter()
    for number, group in enumerate(groups.values(), 1):
        outcomes |= {outcome.case.id: outcome for outcome in _predict_group(group, predict)}
        say(f"{number} of {len(groups)} models and machines, {time.perf_counter() - began:.0f} s")
    return [outcomes[case.id] for case in cases]


def _predict_group(group: Sequence[Case], predict: Predict) -> list[Outcome]:
    outcomes, possible = [], []
    for case in group:
        try:
            possible.append((case, layout_of_case(case)))
        except LayoutError as error:
            outcomes.append(Outcome(case, problem=str(error), refused=True))
    if not possible:
        return outcomes
    first = group[0]
    try:
        predictions = predict(
            build(first.dims),
            cluster_of(first.machine),
            [layout for _, layout in possible],
            seq=first.dims.seq,
            global_batch=first.global_batch,
            run=run_of_case(first),
        )
    except AutoparError as error:
        return outcomes + [Outcome(case, problem=str(error)) for case, _ in possible]
    return outcomes + [_outcome(case, p) for (case, _), p in zip(possible, predictions, strict=True)]


def _outcome(case: Case, prediction: Any) -> Outcome:
    held = tuple((kind, float(n)) for kind, n in prediction.breakdown["memory_bytes"].items())
    return Outcome(case, prediction.step_time_s, float(prediction.peak_bytes), prediction.fits, held)


# -- the parts ----------------------------------------------------------------------------


def training(outcomes: Sequence[Outcome], skipped: Sequence[Skipped]) -> list[Check]:
    """Print every training run, the worst first, and the totals by source."""
    print("Step time of training runs, seconds; error = predicted / measured - 1")
    print(f"{'':2}{'run':<42}{'measured':>10}{'predicted':>11}{'error':>9}   known differences")
    for outcome in sorted(outcomes, key=lambda o: -abs(o.error or float("inf"))):
        print("  " + _line(outcome))
    for source in dict.fromkeys(o.case.source for o in outcomes):
        errors = sizes([o for o in outcomes if o.case.source == source], lambda o: o.error)
        print(f"  median {quantile(errors, 0.5):6.1%} of {len(errors):3} rows: {source}")
    print(f"Not compared, {len(skipped)} rows:")
    for reason in dict.fromkeys(s.reason for s in skipped):
        ids = [s.id for s in skipped if s.reason == reason]
        print(f"  {len(ids):3} {reason}: {', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}")
    return training_checks(outcomes)


def training_checks(outcomes: Sequence[Outcome]) -> list[Check]:
    """The targets of training runs."""
    errors = sizes(outcomes, lambda o: o.error)
    paper = sizes([o for o in outcomes if o.case.id.startswith("korthikanti22")], lambda o: o.error)
    return [
        Check("training rows without a prediction", len(outcomes) - len(errors), 0),
        Check("step time, arXiv 2205.05198: mean error", float(paper.mean()) if len(paper) else float("nan"),
              KORTHIKANTI_MEAN),
        Check("step time, arXiv 2205.05198: largest error", quantile(paper, 1), KORTHIKANTI_MOST),
        Check("step time, training rows: median error", quantile(errors, 0.5), TRAINING_MEDIAN),
        Check("step time, training rows: 90th percentile", quantile(errors, 0.9), TRAINING_P90),
    ]  # fmt: skip


def _line(outcome: Outcome) -> str:
    case, error = outcome.case, outcome.error
    if error is None:
        return f"{case.id:<42}{case.step_s or 0:>10.3f}{'-':>11}{'-':>9}   {outcome.problem}"
    return f"{case.id:<42}{case.step_s:>10.3f}{outcome.step_s:>11.3f}{error:>+9.1%}   {'; '.join(case.caveats)}"


def memory(outcomes: Sequence[Outcome]) -> list[Check]:
    """Print the analytic memory rows: what holds the bytes, on the first stage."""
    print("Memory of the first stage, GiB (analytic in the paper)")
    errors = []
    for outcome in outcomes:
        held = dict(outcome.memory_bytes)
        states = sum(held.get(kind, 0.0) for kind in ("parameters", "gradients", "optimizer"))
        found = {"states": states, "activations": held.get("activations", 0.0)}
        expected = {**outcome.case.expected, "total": sum(outcome.case.expected.values())}
        for kind, nbytes in {**found, "total": sum(found.values())}.items():
            error = relative(nbytes, expected[kind])
            off = float("nan") if error is None or outcome.problem else abs(error)
            if kind != "states":  # the paper leaves the table of positions out, about 1 %
                errors.append(off)
            shown = outcome.problem or f"{nbytes / 2**30:8.2f} {off:7.1%}"
            print(f"  {outcome.case.id:<42} {kind:<12} {expected[kind] / 2**30:8.2f} {shown}")
    return [
        Check("activations and total, arXiv 2205.05198: largest error", max(errors, default=float("nan")), MEMORY_MOST)
    ]


def sweep(outcomes: Sequence[Outcome], skipped: Sequence[Skipped]) -> list[Check]:
    """Print the sweep by cell."""
    print(
        "Sweep over layouts on H100: medians of |error| of finished runs; choice: measured rate of the layout predicted"
    )
    print("best over that of the best")
    print(f"  {'cell':<29}{'ran':>4}{'failed':>7}{'tokens/s':>10}{'Spearman':>10}{'peak':>7}{'choice':>8}"
          f"{'ran: fits':>11}{'failed: not':>13}{'':3}best of all tried")  # fmt: skip
    for cell in cells(outcomes):
        print(f"  {cell.name:<29}{cell.finished:>4}{cell.failed:>7}{cell.median_error:>10.1%}{cell.spearman:>10.3f}"
              f"{cell.median_peak_error:>7.1%}{cell.choice:>8.1%}{cell.ran_fits:>11.1%}{cell.failed_refused:>13.1%}"
              f"{'':3}{'failed' if cell.failed_choice else 'finished'}")  # fmt: skip
    for one in skipped:
        print(f"  not compared: {one.id}: {one.reason}")
    return sweep_checks(outcomes)


def sweep_checks(outcomes: Sequence[Outcome]) -> list[Check]:
    """The targets of the sweep."""
    finished = [o for o in outcomes if o.case.ran]
    failed = [o for o in outcomes if not o.case.ran]
    found = cells(outcomes)
    choices, ranks = np.array([cell.choice for cell in found]), np.array([cell.spearman for cell in found])
    rates, peaks = sizes(finished, rate_error), sizes(finished, lambda o: o.peak_error)
    fits, refused = float(np.mean([o.fits for o in finished])), float(np.mean([not o.fits for o in failed]))
    unpriced = sum(o.step_s is None and not o.refused for o in outcomes)
    return [
        Check("sweep: runs without a prediction", unpriced, 0),
        Check("sweep: tokens/s, median error", quantile(rates, 0.5), SWEEP_MEDIAN),
        Check("sweep: Spearman of the worst cell", quantile(ranks, 0), SWEEP_SPEARMAN, least=True),
        Check("sweep: peak memory, median error", quantile(peaks, 0.5), SWEEP_PEAK),
        Check("sweep: finished runs that are predicted to fit", fits, RAN_FITS, least=True),
        Check("sweep: failed runs that are predicted not to", refused, FAILED_REFUSED, least=True),
        Check("sweep: choice, median of cells", quantile(choices, 0.5), CHOICE_MEDIAN, least=True),
        Check("sweep: choice, worst cell", quantile(choices, 0), CHOICE_LEAST, least=True),
    ]


# -- the script ---------------------------------------------------------------------------


def run(parts: Sequence[str], predict: Predict, say: Say) -> tuple[list[Check], list[Outcome]]:
    """Predict and print the parts; the checks and all outcomes."""
    checks: list[Check] = []
    outcomes: list[Outcome] = []
    for part in parts:
        if part == "choices":
            checks += [*choices.papers(), *choices.sweep()]
            continue
        cases, skipped = CASES[part]()
        found = predict_all(cases, predict, lambda text, part=part: say(f"{part}: {text}"))
        checks += memory(found) if part == "memory" else (training if part == "training" else sweep)(found, skipped)
        outcomes += found
        print()
    return checks, outcomes


CASES: dict[str, Callable[[], tuple[list[Case], list[Skipped]]]] = {
    "training": training_cases,
    "memory": lambda: (memory_cases(), []),
    "sweep": sweep_cases,
}


def to_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every row: measured, predicted and error."""
    return [
        {
            "id": o.case.id,
            "source": o.case.source,
            "gpus": o.case.machine.gpus,
            "global_batch": o.case.global_batch,
            "layout": o.case.layout,
            "ran": o.case.ran,
            "measured_step_s": o.case.step_s,
            "predicted_step_s": o.step_s,
            "error": o.error,
            "measured_peak_bytes": o.case.peak_bytes,
            "predicted_peak_bytes": o.peak_bytes,
            "peak_error": o.peak_error,
            "memory_bytes": dict(o.memory_bytes),
            "expected_bytes": o.case.expected,
            "fits": o.fits,
            "problem": o.problem,
            "known_differences": list(o.case.caveats),
        }
        for o in outcomes
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what is asked for; 1 if a figure is beyond its target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row to FILE")
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    import autopar

    checks, outcomes = run(args.parts or PARTS, autopar.predict, lambda text: print(text, file=sys.stderr))
    if args.json is not None:
        args.json.write_text(json.dumps(to_json(outcomes), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print("\n".join(map(str, checks)))
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
