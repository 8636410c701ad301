"""What planning costs: CPU seconds and memory of one `autopar plan` process, imports and all, per model.

    python benchmarks/planning.py            # the runs below, then benchmarks/planning_scale.py: GPT 530B on 5,128 A100
    python benchmarks/planning.py llama3-8b 64 8192 256     # MODEL GPUS SEQ GLOBAL_BATCH

The mesh shape is left to the planner. Exits with 1 if a run of the list needs more than its limits: CPU seconds,
GiB, and the proven gap. CPU seconds depend on what else the machine does, so that the least of three processes counts;
the list was set on 2 cores of an AMD EPYC.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPEATS = 3  # other work on the machine makes a process take more CPU seconds, never less: the least counts


@dataclass(frozen=True)
class Run:
    """A model and cluster, what is pinned, and what planning may take: CPU seconds, GiB, relative gap."""

    model: str
    gpus: int
    seq: int
    global_batch: int
    most_cpu_s: float = float("inf")
    most_gib: float = float("inf")
    most_gap: float = float("inf")
    pins: tuple[str, ...] = ()


RUNS = (
    Run("llama3-8b", 64, 8192, 256, most_cpu_s=12.0, most_gib=2.0, most_gap=0.01),
    Run("llama3-405b", 1024, 4096, 1024, most_cpu_s=20.0, most_gib=4.0, most_gap=0.02, pins=("pp=1",)),  # op by op
    Run("llama3-405b", 16384, 8192, 2048, most_cpu_s=30.0, most_gib=2.0, most_gap=0.01),  # by degrees
    Run("tiny-llama", 8, 256, 32),
)


@dataclass(frozen=True)
class Took:
    """What one process took, and what it printed. gib: of the largest process so far."""

    cpu_s: float
    gib: float
    plan: dict[str, Any]


def plan_once(run: Run) -> Took:
    """In a process of its own."""
    options = ["plan", "--model", run.model, "--cluster", "h100-sxm", "--gpus", str(run.gpus), "--seq", str(run.seq)]
    options += [word for pin in run.pins for word in ("--pin", pin)]
    command = [sys.executable, "-m", "autopar.cli", *options, "--global-batch", str(run.global_batch), "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(cpu_s, after.ru_maxrss / 2**20, json.loads(done.stdout))


def measure(run: Run) -> bool:
    """Plan a few times and print the figures of the least; whether they stay within the run's limits."""
    every = [plan_once(run) for _ in range(REPEATS)]
    least, plan = min(every, key=lambda took: took.cpu_s), every[0].plan
    most_gib = max(took.gib for took in every)
    within = least.cpu_s <= run.most_cpu_s and most_gib <= run.most_gib and plan["gap"] <= run.most_gap
    print(
        f"{run.model} on {run.gpus} x h100-sxm, {run.global_batch} x {run.seq} tokens: {least.cpu_s:.1f} CPU s "
        f"(at most {max(took.cpu_s for took in every):.1f} of {REPEATS}; trace {least.plan['trace_s']:.1f} s, solve "
        f"{least.plan['solve_s']:.1f} s of wall), {most_gib:.2f} GiB, step "
        f"{plan['step_time_s']:.4g} s, dp {plan['dp']} tp {plan['tp']} pp {plan['pp']} zero {plan['zero']}, "
        f"gap {plan['gap']:.2%}"
        f"{'' if within else '  BEYOND ITS LIMITS'}",
        flush=True,
    )
    return within


def main() -> int:
    """Measure what is asked for, or all of RUNS."""
    if len(sys.argv) == 5:
        return 0 if measure(Run(sys.argv[1], *(int(a) for a in sys.argv[2:]))) else 1
    within = [measure(run) for run in RUNS]  # all of them, also after one that is not
    scale = subprocess.run([sys.executable, str(Path(__file__).with_name("planning_scale.py"))], check=False)
    return 0 if all(within) and scale.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
