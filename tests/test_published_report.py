"""The report of benchmarks/published.py, on predictions that are made up: what it counts, and when it fails."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autopar.errors import TraceError
from autopar.predicting.run import Run
from benchmarks import published
from benchmarks.published_figures import Check, Outcome, cells, spearman
from benchmarks.published_rows import GIB, Case, memory_cases, sweep_cases, training_cases

GOOD = {"training": training_cases()[0], "memory": memory_cases(), "sweep": sweep_cases()[0]}


def outcome(case: Case, slower: float = 1.0, bigger: float = 1.0) -> Outcome:
    """A prediction that is off by these factors; it fits if the case ran."""
    held = case.expected
    return Outcome(
        case,
        step_s=(case.step_s or 1.0) * slower,
        peak_bytes=(case.peak_bytes or GIB) * bigger,
        fits=case.ran,
        memory_bytes=(
            ("parameters", held.get("states", 0.0) * bigger),
            ("gradients", 0.0),
            ("optimizer", 0.0),
            ("activations", held.get("activations", 0.0) * bigger),
        ),
    )


def checks_of(part: str, slower: float = 1.0, bigger: float = 1.0) -> list[Check]:
    outcomes = [outcome(case, slower, bigger) for case in GOOD[part]]
    if part == "memory":
        return published.memory(outcomes)
    return (published.training if part == "training" else published.sweep)(outcomes, [])


@pytest.mark.parametrize("part", [part for part in published.PARTS if part != "choices"])
def test_exact_predictions_pass(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [c.name for c in checks_of(part) if not c.ok] == []
    assert (
        GOOD[part][0].id.split("-")[0].split(" ")[0][:5].lower() in capsys.readouterr().out.lower() or part == "sweep"
    )


@pytest.mark.parametrize(
    ("part", "slower", "bigger", "beyond"),
    [
        ("training", 1.04, 1, ["step time, arXiv 2205.05198: mean error"]),
        ("training", 0.8, 1, [
            "step time, arXiv 2205.05198: mean error",
            "step time, arXiv 2205.05198: largest error",
            "step time, training rows: median error",
            "step time, training rows: 90th percentile",
        ]),
        ("memory", 1, 1.04, ["activations and total, arXiv 2205.05198: largest error"]),
        ("sweep", 1.15, 1.06, ["sweep: tokens/s, median error", "sweep: peak memory, median error"]),
    ],
)  # fmt: skip
def test_wrong_predictions_are_beyond(part: str, slower: float, bigger: float, beyond: list[str]) -> None:
    assert [c.name for c in checks_of(part, slower, bigger) if not c.ok] == beyond


def test_rows_without_a_prediction_are_beyond() -> None:
    found = [Outcome(case, problem="cannot") for case in GOOD["training"]]
    assert not any(c.ok for c in published.training_checks(found))


def test_fit_and_refusal_are_counted() -> None:
    wrong = [dataclasses.replace(outcome(case), fits=not case.ran) for case in GOOD["sweep"]]
    beyond = {c.name: c.value for c in published.sweep_checks(wrong) if not c.ok}
    assert beyond == {
        "sweep: finished runs that are predicted to fit": 0.0,
        "sweep: failed runs that are predicted not to": 0.0,
    }


def test_a_cell_and_its_choice() -> None:
    base = [case for case in GOOD["sweep"] if case.source == GOOD["sweep"][0].source and case.ran][:4]
    measured = [dataclasses.replace(case, step_s=s, global_batch=8) for case, s in zip(base, (1, 2, 4, 8), strict=True)]
    predicted = (3.0, 2.0, 5.0, 9.0)  # the second looks best
    cell = cells([dataclasses.replace(outcome(c), step_s=s) for c, s in zip(measured, predicted, strict=True)])[0]
    assert cell.choice == 0.5 and cell.spearman == pytest.approx(0.8)
    assert cell.median_error == pytest.approx((0.2 + 1 / 9) / 2)


def test_spearman() -> None:
    assert spearman([1, 2, 3], [10, 20, 25]) == 1.0
    assert spearman([1, 2, 2, 3], [4, 3, 3, 1]) == -1.0
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert spearman([1], [1]) != spearman([1], [1])  # NaN


def test_one_call_for_each_model_machine_and_batch() -> None:
    calls: list[tuple[Any, ...]] = []

    def predict(
        model: torch.nn.Module, cluster: Any, layouts: list[Any], *, seq: int, global_batch: int, run: Run
    ) -> list[Any]:
        assert run == Run(cut="threshold", reduces_whole=True, pipeline_pause_s=0.27)
        calls.append((type(model).__name__, cluster.devices, len(layouts), seq, global_batch))
        return [
            SimpleNamespace(
                step_time_s=i + 1.0, peak_bytes=GIB, fits=True, breakdown={"memory_bytes": {"parameters": 7}}
            )
            for i in range(len(layouts))
        ]

    cases = [case for case in GOOD["sweep"] if case.dims.layers == 16 and case.machine.gpus == 128]
    found = published.predict_all(cases, predict)
    assert [o.case.id for o in found] == [c.id for c in cases]
    refused = [o for o in found if o.refused]
    assert refused and all("stages" in str(o.problem) and not o.fits and not o.case.ran for o in refused)
    assert sorted(c[-1] for c in calls) == [128, 256, 896] and {c[:2] for c in calls} == {("LlamaForCausalLM", 128)}
    assert sum(c[2] for c in calls) == len(cases) - len(refused)


def test_an_error_is_a_problem_of_its_rows() -> None:
    def predict(*args: Any, **options: Any) -> list[Any]:
        raise TraceError("no such op")

    found = published.predict_all(GOOD["memory"][:1], predict)
    assert (found[0].problem, found[0].step_s, found[0].refused) == ("no such op", None, False)


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import autopar

    def predict(model: Any, cluster: Any, layouts: list[Any], **options: Any) -> list[Any]:
        held = {"parameters": 45.5625 * GIB, "gradients": 0, "optimizer": 0, "activations": 9.5625 * GIB}
        one = SimpleNamespace(step_time_s=1.0, peak_bytes=GIB, fits=True, breakdown={"memory_bytes": held})
        return [one for _ in layouts]

    monkeypatch.setattr(autopar, "predict", predict, raising=False)
    path = tmp_path / "rows.json"
    assert published.main(["memory", "--json", str(path)]) == 1  # only one of the four has this many activations
    assert "BEYOND" in capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert len(rows) == 4 and rows[0]["predicted_step_s"] == 1.0 and rows[0]["expected_bytes"]["states"]
    with pytest.raises(SystemExit):
        published.main(["weather"])
    assert "unknown part 'weather'; the parts are training, memory, sweep" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["published.py", "choices.py"])
def test_runs_as_a_script(script: str) -> None:
    """From any folder, without the project's root on the path."""
    path = Path(published.__file__).with_name(script)
    done = subprocess.run([sys.executable, path, "nope"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    assert "unknown part 'nope'" in done.stderr
