"""What planning costs: CPU seconds and memory of tracing, stating and solving, one fresh process per model.

    python benchmarks/bench_planning.py [MODEL GPUS SEQ GLOBAL_BATCH]

Prints one line per stage. Without arguments: Llama-3 8B on 64 H100, then the tiny Llama on 8, each on the mesh of
one axis.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

RUNS = (("llama3-8b", "64", "8192", "256"), ("tiny-llama", "8", "256", "32"))


def stage(name: str, began: float) -> float:
    """Print the CPU seconds since `began`; the present CPU time."""
    now = time.process_time()
    print(f"  {name:<22}{now - began:7.2f} CPU s")
    return now


def measure(model_name: str, gpus: int, seq: int, batch: int) -> None:
    """Plan one model in this process on a one-axis mesh of all devices, stage by stage."""
    began = time.process_time()
    import autopar
    import autopar.api
    from autopar.cost.model import CostModel
    from autopar.cost.optimizer import OptimizerSpec
    from autopar.models import example_inputs, load_model
    from autopar.sharding import build_problem
    from autopar.trace import trace

    at = stage("imports", 0.0)
    model = load_model(model_name)
    inputs = example_inputs(model, batch, seq)
    at = stage("model on meta", at)
    traced = trace(model, inputs)
    at = stage(f"trace, {len(traced.graph_module.graph.nodes)} nodes", at)
    cluster = autopar.ClusterSpec.preset("h100-sxm", gpus=gpus)
    build_problem(traced, CostModel(cluster, (gpus,)), OptimizerSpec("adamw"))
    at = stage("problem", at)
    plan = autopar.plan(model, cluster, example_inputs=inputs, pin={"mesh": [gpus]})
    at = stage("plan (traces again)", at)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = f"step {plan.objective_s:.4g} s, {plan.status}, gap {plan.gap:.2%}"
    print(f"  all {at - began:.1f} CPU s, {peak:.2f} GiB; {found}")


def main() -> None:
    """Measure what is asked for, or each of RUNS in a process of its own."""
    if len(sys.argv) == 5:
        measure(sys.argv[1], *(int(a) for a in sys.argv[2:]))
        return
    for run in RUNS:
        print(" ".join(run), flush=True)
        subprocess.run([sys.executable, __file__, *run], check=True)


if __name__ == "__main__":
    main()
