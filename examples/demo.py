"""`make demo`: one model trained by one process and by four, side by side.

Runs examples/train_llama.py twice on the same data and seeds, draws both loss curves to
out/demo.png and ends with one line that says whether they agree, and whether the memory of
a rank is what was predicted. The exit code says the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
OUT = ROOT / "out"
TRAIN = ROOT / "examples" / "train_llama.py"
PROCESSES = 4
LOSS_TOLERANCE = 1e-3  # float32: the order of sums differs, and training lets rounding grow
MEMORY_TOLERANCE = 0.05
MEMORY_LIMIT_MB = 30.0  # a fifth of what one process needs
SEARCH_LIMIT_S = 15.0  # for the plan; the report says what is left unproven
SPARKS = "▁▂▃▄▅▆▇█"


def run(name: str, *command: str) -> dict[str, Any]:
    """Run one training; its result file."""
    result = OUT / f"{name}.json"
    result.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = subprocess.run([sys.executable, *command, "--out", str(result)], env=environment, cwd=ROOT).returncode
    if code != 0 or not result.exists():
        sys.exit(f"demo: FAILED: the run on {name} ended with exit code {code}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def sparkline(values: list[float]) -> str:
    """The values as a row of small bars."""
    low, high = min(values), max(values)
    return "".join(SPARKS[round((v - low) / (high - low or 1.0) * (len(SPARKS) - 1))] for v in values)


def show_losses(single: list[float], parallel: list[float]) -> None:
    """Both curves as bars and, every few steps, as numbers."""
    print(f"\n1 process   {sparkline(single)}\n{PROCESSES} processes {sparkline(parallel)}\n")
    print(f"{'step':>6} {'1 process':>14} {f'{PROCESSES} processes':>14} {'difference':>12}")
    for step in sorted({*range(0, len(single), 8), len(single) - 1}):
        a, b = single[step], parallel[step]
        print(f"{step:>6} {a:>14.6f} {b:>14.6f} {abs(a - b):>12.1e}")


def draw(single: list[float], parallel: list[float], path: Path) -> None:
    """Both curves in one picture, their difference below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(7.2, 4.6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    upper.plot(single, color="#9ab8d8", linewidth=5, label="1 process, plain PyTorch")
    upper.plot(parallel, color="#12355b", linewidth=1.3, label=f"{PROCESSES} processes, autopar")
    upper.set_ylabel("loss (nats per byte)")
    upper.set_title("A small Llama on Python's documentation: one script, one process or four")
    upper.legend(frameon=False)
    lower.plot([abs(a - b) for a, b in zip(single, parallel, strict=True)], color="#b5482a")
    lower.set_ylabel("|difference|")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run both, show both; 0 if they agree."""
    OUT.mkdir(exist_ok=True)
    print("== 1 process, plain PyTorch")
    single = run("single", str(TRAIN))
    print(f"\n== {PROCESSES} processes, compiled by autopar for {MEMORY_LIMIT_MB:g} MB a rank")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES))
    limits = ("--memory-limit-mb", f"{MEMORY_LIMIT_MB:g}", "--time-limit-s", f"{SEARCH_LIMIT_S:g}")
    parallel = run("parallel", *launch, str(TRAIN), *limits)

    show_losses(single["losses"], parallel["losses"])
    picture = OUT / "demo.png"
    draw(single["losses"], parallel["losses"], picture)
    print(f"\nBoth curves: {picture.relative_to(ROOT)}")

    difference = max(abs(a - b) for a, b in zip(single["losses"], parallel["losses"], strict=True))
    predicted, measured = parallel["predicted_peak_bytes"], parallel["peak_bytes"]
    error = predicted / measured - 1
    learned = single["losses"][-1] < single["losses"][0] - 1
    good = learned and difference <= LOSS_TOLERANCE and abs(error) <= MEMORY_TOLERANCE
    print(
        f"Peak memory: {single['peak_bytes'] / 1e6:.1f} MB on one process; a rank of {PROCESSES}: "
        f"{predicted / 1e6:.2f} MB predicted, {measured / 1e6:.2f} MB measured ({error:+.1%})."
    )
    print(
        f"demo: {'ok' if good else 'FAILED'}: loss {parallel['losses'][0]:.3f} -> {parallel['losses'][-1]:.3f} on "
        f"{PROCESSES} processes, at most {difference:.1e} from one process over {len(single['losses'])} steps; "
        f"memory predicted within {abs(error):.1%}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
