"""Samples per second of autopar against DDP, FSDP2 and tensor parallelism by hand, on the cores of this machine.

    python benchmarks/throughput.py [--models llama bert resnet] [--rounds 12]

Same model, same batch, same optimizer (fused AdamW), 2 gloo processes of one thread each, one run. Each round times
one step of every variant, in turn and the next time in reverse, and what is compared is the ratio of two steps of one
round, its median over the rounds: a machine that is slower for a while slows both. The middle half of these ratios is
printed beside; where it is wide, the machine was not idle. The plan is autopar's own for `ClusterSpec.local()`.
Also: one process against the eager model, in twice the rounds, and a memory limit that plain DDP exceeds, against FSDP2
with checkpointed layers at the same measured peak. A model with batch norm is compared with DDP and FSDP2 whose batch
norm is synchronized by hand (`batch_norm.py`): the plain ones take each rank's own statistics, another function
than the model's; their ratio is printed beside. Exits with 1 where a ratio is below its target.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"parallel": 1.0, "one": 0.98, "limited": 1.0}
WARM_UP = 2
_CLUSTER = "AUTOPAR_BENCH_CLUSTER"
SYNCHRONIZED = " + synchronized batch norm"


@dataclass
class Variant:
    """One way to train. externals: what it holds in memory between steps."""

    name: str
    step: Callable[[], object]
    externals: tuple[Any, ...]


def variant(name: str, module: Any, batch: dict[str, Any]) -> Variant:
    """Trains `module` on `batch`, forward, backward, optimizer."""
    import torch
    from torch.distributed.tensor import DTensor

    groups: dict[bool, list[Any]] = {}  # the fused kernel does not take DTensors and tensors together
    for param in module.parameters():
        groups.setdefault(isinstance(param, DTensor), []).append(param)
    optimizer = torch.optim.AdamW([{"params": g} for g in groups.values()], lr=1e-4, fused=True)

    train_step = getattr(module, "train_step", lambda **batch: module(**batch)["loss"].backward())

    def step() -> None:
        train_step(**batch)
        optimizer.step()
        optimizer.zero_grad()

    return Variant(name, step, (module, optimizer, *batch.values()))


def timed(variants: list[Variant], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of every variant's step in each round; all ranks start a step together."""
    import torch.distributed as dist

    seconds: dict[str, list[float]] = {v.name: [] for v in variants}
    for turn in range(-WARM_UP, rounds):
        for one in variants if turn % 2 else reversed(variants):
            if dist.is_initialized():
                dist.barrier()
            began = time.perf_counter()
            one.step()
            if dist.is_initialized():
                dist.barrier()
            if turn >= 0:
                seconds[one.name].append(time.perf_counter() - began)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one variant is as another, step against step of the same round.

    low, high: the ends of the middle half of the rounds.
    """

    median: float
    low: float
    high: float

    @staticmethod
    def of(ours: list[float], theirs: list[float]) -> Ratio:
        """From the seconds of each round."""
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return Ratio(median, low, high)


def peak(one: Variant) -> int:
    """Measured peak bytes of a step, on the rank where they are most."""
    import torch
    import torch.distributed as dist

    from autopar.runtime.memory import measure_peak

    found = torch.tensor([measure_peak(one.step, *one.externals)])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found.item())


# -- on the ranks -----------------------------------------------------------------------------------------------


def on_one(name: str, rounds: int) -> dict[str, Any]:
    """autopar on one device against the eager model."""
    import autopar
    from benchmarks.workloads import WORKLOADS

    work, batch = WORKLOADS[name], WORKLOADS[name].batch()
    program = autopar.compile(work.build(), autopar.ClusterSpec.preset("cpu", gpus=1), example_inputs=((), batch))
    variants = [variant("eager", work.build(), batch), variant("autopar", program, batch)]
    return {"seconds": timed(variants, 2 * rounds), "samples": work.samples}


def on_ranks(name: str, rounds: int) -> dict[str, Any]:
    """autopar on all ranks against what torch offers, without a memory limit and with one that DDP exceeds."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import autopar
    from benchmarks import workloads as w
    from benchmarks.batch_norm import synchronized

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    work, batch = w.WORKLOADS[name], w.WORKLOADS[name].batch()
    mine = w.rows(batch, rank, world)

    def built(make: Callable[..., Any], *, synchronize: bool = False) -> Any:
        torch.manual_seed(0)
        model = work.build()
        return make(synchronized(model) if synchronize else model, mesh, work)

    def planned(limit: int | None) -> Any:
        torch.manual_seed(0)
        given = os.environ.get(_CLUSTER)
        cluster = autopar.ClusterSpec.load(given) if given else autopar.ClusterSpec.local()
        return autopar.compile(work.build(), cluster, example_inputs=((), batch), memory_limit_bytes=limit)

    program = planned(None)
    variants = [variant("autopar", program, batch)]
    variants.append(variant("DDP", built(w.data_parallel), mine))
    variants.append(variant("FSDP2", built(w.sharded), mine))
    normed = w.has_batch_norm(work.build())
    if normed:
        variants.append(variant("DDP" + SYNCHRONIZED, built(w.data_parallel, synchronize=True), mine))
        variants.append(variant("FSDP2" + SYNCHRONIZED, built(w.sharded, synchronize=True), mine))
    if work.tensor_parallel is not None:
        variants.append(variant("tensor parallel", built(w.tensor_parallel), batch))
    found: dict[str, Any] = {"seconds": timed(variants, rounds), "samples": work.samples}
    found["layout"] = program.plan.layout_keys
    ddp_peak = peak(variants[1])
    del variants

    by_hand = "FSDP2 + checkpointing" + (SYNCHRONIZED if normed else "")
    checkpointed = variant(by_hand, built(w.sharded_and_checkpointed, synchronize=normed), mine)
    checkpointed.step()
    limit = peak(checkpointed)
    try:
        limited = planned(limit)
    except autopar.Infeasible as error:
        return _leave(found | {"limited": {"error": str(error)}})
    variants = [checkpointed, variant("autopar", limited, batch)]
    limited_seconds = timed(variants, rounds)
    found["limited"] = {
        "seconds": limited_seconds, "layout": limited.plan.layout_keys,
        "peaks": {"DDP": ddp_peak, checkpointed.name: limit, "autopar": peak(variants[1])},
    }  # fmt: skip
    return _leave(found)


def _leave(found: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    return found


# -- the report -------------------------------------------------------------------------------------------------


def run(kind: str, name: str, rounds: int, processes: int) -> dict[str, Any]:
    """What the ranks measured, from a fresh job."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(Path(__file__).resolve()), "--worker", kind, "--models", name, "--rounds", str(rounds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("{")), None)
    if done.returncode or line is None:
        raise SystemExit(f"{kind} {name} failed:\n{done.stdout}\n{done.stderr}")
    return dict(json.loads(line))


def show(title: str, seconds: dict[str, list[float]], samples: int, target: float) -> bool:
    """Print the rates and the ratio to the best of the others that compute the same; whether it reaches the target."""
    same = [n for n in seconds if n.endswith(SYNCHRONIZED)] or [n for n in seconds if n != "autopar"]
    rates = {name: samples / statistics.median(taken) for name, taken in seconds.items()}
    ratios = {name: Ratio.of(seconds["autopar"], taken) for name, taken in seconds.items() if name != "autopar"}
    print(f"{title:<22}" + "  ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
    best = min(same, key=lambda name: ratios[name].median)
    passed = ratios[best].median >= target
    print(f"{'':<22}{_compared(best, ratios[best])}  (target {target})  {'ok' if passed else 'BELOW'}")
    for name in [n for n in ratios if n not in same]:
        print(
            f"{'':<22}{_compared(name, ratios[name])}, which computes something else: statistics of a rank's own rows"
        )
    return passed


def _compared(name: str, ratio: Ratio) -> str:
    return f"autopar / {name} = {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def report(name: str, rounds: int) -> bool:
    """Measure one model and print its three comparisons."""
    one = run("one", name, rounds, 1)
    print(f"{name}: samples/s, medians of {rounds} rounds; ratios by round, with their middle half")
    passed = show("  1 rank", one["seconds"], one["samples"], TARGETS["one"])
    two = run("ranks", name, rounds, 2)
    passed &= show("  2 ranks", two["seconds"], two["samples"], TARGETS["parallel"])
    limited = two["limited"]
    if "error" in limited:
        print(f"  2 ranks, limited    BELOW: {limited['error']}", flush=True)
        return False
    passed &= show("  2 ranks, limited", limited["seconds"], two["samples"], TARGETS["limited"])
    peaks = {key: f"{value / 2**20:.1f}" for key, value in limited["peaks"].items()}
    print(f"{'':<22}measured peaks in MiB: {peaks}; layouts {two['layout']}, limited {limited['layout']}", flush=True)
    by_hand = next(key for key in limited["peaks"] if key.startswith("FSDP2"))
    if not limited["peaks"]["autopar"] <= limited["peaks"][by_hand] < limited["peaks"]["DDP"]:
        print(f"{'':<22}peaks out of order: BELOW")
        return False
    return passed


def main() -> None:
    """The report of all models, or the measurements of one rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama", "bert", "resnet"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cluster", help="plan for this cluster file (of `autopar profile`), not ClusterSpec.local()")
    parser.add_argument("--worker", choices=["one", "ranks"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cluster:
        os.environ[_CLUSTER] = given.cluster
    if given.worker:
        measured = (on_one if given.worker == "one" else on_ranks)(given.models[0], given.rounds)
        if os.environ["RANK"] == "0":
            print(json.dumps(measured), flush=True)
        return
    passed = [report(name, given.rounds) for name in given.models]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{used.ru_utime + used.ru_stime:.0f} CPU seconds")
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
