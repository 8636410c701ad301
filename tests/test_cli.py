"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import autopar
from autopar import cli, command_line, errors
from autopar.fixes import Fix

ROOT = Path(__file__).parent.parent
PLAN = ["plan", "--model", "llama3-8b", "--cluster", "h100-sxm", "--global-batch", "8"]
PREDICT = ["predict", *PLAN[1:], "--seq", "1024"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("text", "pin"),
    [
        ("tp=4", ("tp", 4)),
        ("tp=2,2", ("tp", (2, 2))),
        ("sp=true", ("sp", True)),
        ("recompute=selective", ("recompute", "selective")),
        ("layers.*.mlp.up_proj.weight=R,S(0)", ("layers.*.mlp.up_proj.weight", ("R", "S(0)"))),
        ("lm_head.weight=S(0)", ("lm_head.weight", ("S(0)",))),
        ("layers.*.mlp = recompute", ("layers.*.mlp", "recompute")),
    ],
)
def test_pins(text: str, pin: tuple[str, Any]) -> None:
    assert command_line.parse_pin(text) == pin


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND (see autopar --help)"),
        (["plan"], "arguments are required: --model, --cluster, --global-batch (see autopar plan --help)"),
        ([*PLAN, "--gpus", "0"], "argument --gpus: expected at least 1, got 0 (see autopar plan --help)"),
        ([*PLAN, "--gpus", "x"], "argument --gpus: expected a whole number, got 'x' (see autopar plan --help)"),
        ([*PLAN, "--memory-limit-gb", "nan"], "argument --memory-limit-gb: expected a positive number, got nan"),
        ([*PLAN, "--pin", "tp"], "argument --pin: expected KEY=VALUE, got 'tp' (see autopar plan --help)"),
        ([*PLAN, "--memory-limit-gb", "8", "--memory-limit-bytes", "8"], "not allowed with argument --memory-limit-gb"),
        (PREDICT, "the following arguments are required: --layout (see autopar predict --help)"),
        (["explain"], "the following arguments are required: plan (see autopar explain --help)"),
        (["fly"], "argument COMMAND: invalid choice: 'fly'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (command_line.EXIT_USAGE, "")
    assert err.startswith("autopar: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["explain", "no-such-plan.json"], "cannot read plan no-such-plan.json"),
        (["verify", "no-such-plan.json"], "cannot read plan no-such-plan.json"),
        ([*PLAN, "-o", "no-such-folder/plan.json"], "the folder no-such-folder does not exist or is not writable"),
        ([*PLAN, "-o", "/"], "cannot write /: it is a folder"),
        ([*PLAN[:4], "h100-sxn", *PLAN[5:]], "h100-sxn"),
        ([*PLAN[:2], "llama3-8c", *PLAN[3:]], "llama3-8c"),
        ([*PREDICT, "--layout", "tp=3"], "layout: tp * pp * cp = 3 * 1 * 1 = 3 does not divide the 8 devices"),
        ([*PREDICT, "--layout", "tp=8", "--layout", "tpp=2"], "layout: unknown key 'tpp' (did you mean tp?)"),
        (
            [*PREDICT, "--layout", "pp=64", "--gpus", "64"],
            "layout: pp * vpp = 64 * 1 = 64 stages, but the model has 32",
        ),
        (
            [*PREDICT, "--layout", "tp=64", "--gpus", "64"],
            "layout: 32 attention heads do not divide by tp=64; change tp",
        ),
        ([*PREDICT, "--layout", "tp=8,zero=4"], "layout: zero=4 is out of range; give 0 to 3"),
        ([*PREDICT, "--layout", "pp=8,micro_batch=3"], "layout: global batch 8 does not divide by dp * micro_batch"),
        ([*PREDICT, "--layout", "dp=8", "--precision", "bf17"], "precision='bf17' is unknown"),
        ([*PREDICT, "--layout", "dp=8", "--optimizer", "adamm"], "unknown optimizer 'adamm'"),
        ([*PREDICT[:-2], "--layout", "dp=8"], "LlamaForCausalLM reads sequences of any length; pass seq="),
        ([*PLAN, "--pin", "tp=2", "--pin", "tp=4"], "pin tp is given twice, as 2 and as 4: keep one"),
    ],
)
def test_errors_are_one_line_and_exit_1(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (cli.EXIT_ERROR, "")
    assert err.startswith("autopar: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.AutoparError, cli.EXIT_ERROR),
        (errors.PlanMismatch, cli.EXIT_ERROR),
        (errors.Infeasible, cli.EXIT_INFEASIBLE),
        (errors.VerifyError, cli.EXIT_VERIFY),
        (KeyboardInterrupt, cli.EXIT_INTERRUPTED),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    expected: int,
) -> None:
    def fail(path: Path) -> None:
        raise error("first line\n  second line")

    monkeypatch.setattr(autopar.Plan, "load", fail)
    code, out, err = run(capsys, "explain", "plan.json")
    assert (code, out) == (expected, "")
    assert err == ("autopar: stopped\n" if error is KeyboardInterrupt else "autopar: error: first line second line\n")


@pytest.mark.parametrize("as_json", [False, True])
def test_what_does_not_fit_comes_with_what_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    fixes = tuple(Fix(f"zero 0 to {z}", {"zero": z}, {"zero": z}, 8, 1.0, 3 << 30, 0.05) for z in (1, 2))

    def fail(path: Path) -> None:
        raise errors.Infeasible("nothing fits", 5, "stage 0", short_by_bytes=2, fixes=fixes)

    monkeypatch.setattr(autopar.Plan, "load", fail)
    code, out, err = run(capsys, "explain", "plan.json", *(["--json"] if as_json else []))
    assert code == cli.EXIT_INFEASIBLE
    said = ["any one of these makes it fit:", *(f"  {fix}, 3.00 GiB" for fix in fixes)]
    assert err.splitlines() == ["autopar: error: nothing fits", *([] if as_json else said)]
    if as_json:
        data = json.loads(out)
        assert (data["needed_bytes"], data["short_by_bytes"], data["where"]) == (5, 2, "stage 0")
        assert [fix["change"] for fix in data["fixes"]] == [{"zero": 1}, {"zero": 2}]
    assert str(fixes[0]) == "zero 0 to 1 (+5% time)"


def test_a_bug_is_not_dressed_up_as_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(autopar.Plan, "load", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["explain", "plan.json"])


def test_help_is_instant_and_has_examples() -> None:
    script = "import sys; from autopar.cli import build_parser as b; b().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- the whole way ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A plan of a small Llama made by the command line, with what `--json` printed."""
    folder = tmp_path_factory.mktemp("cli")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "vocab_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    argv = ["plan", "--model", str(folder / "config.json"), "--cluster", "cpu", "--gpus", "2", "--seq", "16"]
    argv += ["--global-batch", "8", "--attention", "eager", "--pin", "tp=2"]
    argv += ["-o", str(folder / "plan.json"), "--json", "--dump-dir", str(folder / "stages")]
    done = subprocess.run([sys.executable, "-m", "autopar.cli", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "plan.json", json.loads(done.stdout)


def test_plan_prints_the_layout_and_its_figures(plan_file: tuple[Path, dict[str, Any]]) -> None:
    printed = plan_file[1]
    layout = {"dp", "tp", "pp", "cp", "ep", "vpp", "micro_batch", "zero", "sp", "recompute", "schedule", "grad_dtype"}
    figures = {"step_time_s", "tokens_per_s_per_gpu", "mfu", "hfu", "peak_bytes", "fits", "breakdown"}
    assert layout | figures | {"gap", "solve_s", "trace_s"} <= set(printed)
    assert (printed["dp"], printed["tp"]) == (1, 2)
    assert printed["fits"] is True
    assert 0 <= printed["gap"] <= 1e-3
    assert printed["trace_s"] > 0
    assert printed["tokens_per_s_per_gpu"] == pytest.approx(16 * 8 / 2 / printed["step_time_s"], rel=1e-6)


def test_the_stages_are_dumped(plan_file: tuple[Path, dict[str, Any]]) -> None:
    stages = plan_file[0].parent / "stages"
    assert len(list(stages.iterdir())) == 5
    assert autopar.Plan.load(stages / "03_plan.json").decisions == autopar.Plan.load(plan_file[0]).decisions


def test_explain_prints_and_writes(
    capsys: pytest.CaptureFixture[str], plan_file: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    code, out, err = run(capsys, "explain", str(plan_file[0]))
    assert (code, err) == (0, "")
    assert out.strip() == str(autopar.Plan.load(plan_file[0]).explain()).strip()
    code, out, _ = run(capsys, "explain", str(plan_file[0]), "--json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(autopar.Plan.load(plan_file[0]).explain().to_dict()))
    page = tmp_path / "plan.html"
    code, out, _ = run(capsys, "explain", str(plan_file[0]), "--html", str(page))
    assert code == 0
    assert out == f"Written to {page}\n"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "Each decision against its next best" in text


def test_a_page_runs_no_code_that_a_plan_file_names(
    capsys: pytest.CaptureFixture[str],
    plan_file: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "somebodys.py").write_text("open('it ran', 'w').close()\n")
    data = json.loads(plan_file[0].read_text())
    data["options"]["model"] = "somebodys:build"
    (tmp_path / "plan.json").write_text(json.dumps(data))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    code, out, err = run(capsys, "explain", "plan.json", "--html", "plan.html")
    assert (code, out, err) == (0, "Written to plan.html\n", "")
    assert "not done for this page" in (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert not (tmp_path / "it ran").exists()
    data["options"]["model"] = str(tmp_path / "no-such-config.json")
    (tmp_path / "plan.json").write_text(json.dumps(data))
    code, out, err = run(capsys, "explain", "plan.json", "--html", "plan.html")
    assert (code, out) == (0, "Written to plan.html\n") and err.count("\n") == 1
    assert err.startswith("autopar: the page is without what takes the model: ") and "no-such-config.json" in err


def test_explain_answers_questions(capsys: pytest.CaptureFixture[str], plan_file: tuple[Path, dict[str, Any]]) -> None:
    path = str(plan_file[0])
    code, out, err = run(capsys, "explain", path, "--why-not", "dp=2", "--why-not", "zero=3", "--time-limit-s", "5")
    assert (code, err) == (0, "")
    assert out.startswith("why not dp=2, zero=3: ") and "what costs differ" in out
    code, out, _ = run(capsys, "explain", path, "--why-not", "tp=4", "--next-best", "lm_head.weight", "--json")
    answers = json.loads(out)["answers"]
    assert code == 0 and [a["outcome"] for a in answers] == ["impossible", "solved"]
    assert "do not make 2 devices" in answers[0]["reason"] and answers[1]["extra_bytes"] is not None
    code, out, _ = run(capsys, "explain", path, "--next-best", "lm_tail", "--time-limit-s", "1")
    assert (code, out) == (cli.EXIT_ERROR, "")


def test_explain_compares_plans(
    capsys: pytest.CaptureFixture[str], plan_file: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, other = str(plan_file[0]), tmp_path / "other.json"
    code, out, _ = run(capsys, "explain", path, "--diff", path)
    assert (code, out) == (0, "the plans are the same\n")
    data = json.loads(plan_file[0].read_text())
    data["layout"]["sp"] = not data["layout"]["sp"]
    other.write_text(json.dumps(data))
    code, out, _ = run(capsys, "explain", path, "--diff", str(other), "--json")
    assert code == 0 and set(json.loads(out)["layout"]) == {"sp"}


def predicted(capsys: pytest.CaptureFixture[str], *layouts: str, as_json: bool = True) -> str:
    argv = ["predict", "--model", "tiny-llama", "--cluster", "h100-sxm", "--gpus", "4", "--seq", "64"]
    argv += ["--global-batch", "8", *(part for layout in layouts for part in ("--layout", layout))]
    code, out, err = run(capsys, *argv, *(["--json"] if as_json else []))
    assert (code, err) == (0, "")
    return out


def test_predict_prints_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads(predicted(capsys, "tp=2,micro_batch=2,recompute=full"))
    assert {"step_time_s", "tokens_per_s_per_gpu", "mfu", "hfu", "peak_bytes", "fits", "breakdown"} <= set(printed)
    assert printed["layout"]["dp"] == 2 and printed["layout"]["sp"] is True and printed["fits"] is True
    assert printed["tokens_per_s_per_gpu"] == pytest.approx(64 * 8 / 4 / printed["step_time_s"])
    text = predicted(capsys, "tp=2,micro_batch=2,recompute=full", as_json=False)
    assert "on the fullest device: fits" in text and "dp=2,tp=2,pp=1" in text


def test_predict_compares_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    layouts = ("tp=4", "pp=2,micro_batch=1", "dp=4,micro_batch=2")
    found = json.loads(predicted(capsys, *layouts))["predictions"]
    assert [p["layout"]["tp"] for p in found] == [4, 1, 1] and [p["layout"]["dp"] for p in found] == [1, 2, 4]
    lines = predicted(capsys, *layouts, as_json=False).splitlines()
    fastest = min(range(3), key=lambda i: found[i]["step_time_s"])
    assert [line.startswith("*") for line in lines[1:4]] == [i == fastest for i in range(3)]
    assert lines[2].endswith("dp=2,pp=2,micro_batch=1,zero=0,schedule=1f1b") and lines[4] == "* the fastest that fits"


def test_predict_writes_a_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "guess.html"
    argv = ["predict", "--model", "tiny-llama", "--cluster", "h100-sxm", "--gpus", "4", "--seq", "64"]
    argv += ["--global-batch", "8", "--layout", "tp=2", "--layout", "dp=4", "--html", str(page)]
    code, out, err = run(capsys, *argv)
    assert (code, err) == (0, "") and out.endswith(f"Written to {page}\n")
    assert "error bar: " in out and "with a part 10% faster" in out and "one key of the best layout changed" in out
    assert "autopar prediction of tiny-llama" in page.read_text(encoding="utf-8")
    code, out, err = run(capsys, *argv[:-1], "/no-such-folder/guess.html")
    assert (code, out) == (cli.EXIT_ERROR, "") and "does not exist or is not writable" in err


def sized(target: str, *options: str) -> list[str]:
    """argv of a sizing of tiny-llama on at most a node."""
    argv = ["size", "--model", "tiny-llama", "--seq", "64", "--global-batch", "32", "--target", target]
    return [*argv, "--clusters", "h100-sxm,a100-80g", "--max-gpus", "8", *options]


def test_size_prints_the_rows_and_writes_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    written, page = tmp_path / "size.json", tmp_path / "size.html"
    code, out, _ = run(capsys, *sized("1B tokens in 30 days", "--json", "-o", str(written), "--html", str(page)))
    assert code == 0
    printed = json.loads(out)
    assert printed == json.loads(written.read_text()) and printed["model"] == "tiny-llama"
    assert "tiny-llama" in json.dumps(printed) and "<html" in page.read_text(encoding="utf-8")
    code, text, _ = run(capsys, *sized("1B tokens in 30 days"))
    assert code == 0 and "h100-sxm" in text and "a100-80g" in text


def test_size_says_what_a_target_out_of_reach_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *sized("step in 0.001 ms"))
    assert (code, out) == (cli.EXIT_INFEASIBLE, "") and "no cluster reaches 'step in 0.001 ms'" in err.splitlines()[-1]
    code, out, err = run(capsys, *sized("a while"))
    assert (code, out) == (cli.EXIT_ERROR, "") and "a while" in err


def test_the_network_is_an_option_of_presets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["predict", "--model", "tiny-llama", "--seq", "64", "--global-batch", "64", "--layout", "dp=16", "--json"]
    seconds = []
    for rate in ("400", "1"):
        argv_ = [*argv, "--cluster", "h100-sxm", "--gpus", "16", "--inter-node-gbit-per-s", rate]
        seconds.append(json.loads(run(capsys, *argv_)[1])["step_time_s"])
    assert seconds[1] > seconds[0]
    path = tmp_path / "cluster.json"
    autopar.ClusterSpec.preset("h100-sxm", gpus=16).save(path)
    code, _, err = run(capsys, *argv, "--cluster", str(path), "--inter-node-gbit-per-s", "100")
    assert code == cli.EXIT_ERROR and "--inter-node-gbit-per-s goes with a preset" in err


def test_verify_finds_the_model_in_the_plan(
    capsys: pytest.CaptureFixture[str], plan_file: tuple[Path, dict[str, Any]]
) -> None:
    code, out, err = run(capsys, "verify", str(plan_file[0]), "--json")
    assert code == 0, err
    assert json.loads(out)


def test_verify_refuses_another_model(
    capsys: pytest.CaptureFixture[str], plan_file: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    config = json.loads((plan_file[0].parent / "config.json").read_text())
    other = tmp_path / "config.json"
    other.write_text(json.dumps({**config, "intermediate_size": 192}))
    code, out, err = run(capsys, "verify", str(plan_file[0]), "--model", str(other))
    assert (code, out) == (cli.EXIT_ERROR, "")
    assert err.count("\n") == 1


MLP = """
import torch
from torch import nn

class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return {"loss": (self.down(torch.relu(self.up(x))) - x).square().mean()}

    def example_inputs(self, batch, seq):
        return (), {"x": torch.zeros(batch, 32, device="meta")}
"""


def test_infeasible_is_exit_3_and_says_what_would_fit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user_mlp.py").write_text(MLP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the present folder
    argv = ["plan", "--model", "user_mlp:Mlp", "--cluster", "cpu", "--gpus", "2", "--global-batch", "8"]
    code, out, err = run(capsys, *argv, "--memory-limit-bytes", "1000")
    assert (code, out) == (cli.EXIT_INFEASIBLE, "")
    message = next(line for line in err.splitlines() if line.startswith("autopar: error"))
    needed = re.fullmatch(r"autopar: error: no plan fits .*the leanest needs .*\((\d+) bytes\).*", message)
    assert needed is not None, message
    code, out, err = run(capsys, *argv, "--memory-limit-bytes", needed[1], "--json")
    assert code == 0, err
    assert json.loads(out)["peak_bytes"] <= int(needed[1])
