"""What the search over layouts finds, beside what people measured or published.

    python benchmarks/choices.py             # everything; exits with 1 where what people did is predicted faster
    python benchmarks/choices.py papers      # parts: papers, sweep

papers: large trainings whose layout was published; the layout that the search finds, and what the authors' own is
predicted to take. sweep: for every model and machine of the sweep in `benchmarks/data`, the fastest layout that was
tried and fits, against the free choice. Both are predictions; `benchmarks/published.py` says how far those are off.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, too

import autopar
from autopar.choosing.plan import choose
from autopar.errors import LayoutError
from autopar.layout_text import short
from autopar.models import load_model
from autopar.predicting.predict import Prediction, Predictor
from autopar.predicting.run import Run
from benchmarks.published_figures import Check
from benchmarks.published_models import build, cluster_of, layout_of_case, run_of_case
from benchmarks.published_rows import Case, sweep_cases

PARTS = ("papers", "sweep")
TIME_LIMIT_S = 120.0


@dataclass(frozen=True)
class Paper:
    """A training whose layout its authors published. run: how they ran it, where that is not the usual way."""

    name: str
    model: str
    cluster: str
    gpus: int
    seq: int
    global_batch: int
    layout: str
    source: str
    attention: str = "sdpa"
    run: Run | None = None


# Grattafiori et al. 2024, section 3.3.2: the first and the last stage have a layer less; FSDP shards gradients and
# optimizer state, but keeps parameters after the forward pass; it reduces beside the backward pass and gathers beside
# the forward pass; sends are asynchronous; a profile of all allocations decides what is freed when, which is read as:
# a gated activation keeps its two inputs only, and no memory is lost to fragments. What makes nanotron's pipelines and
# tensor groups stall has not been seen elsewhere.
_LLAMA3 = Run(
    fusion="all", cut="ends", overlap=True, gathers_ahead=True, fragmentation=0.0, holds_buffers=False,
    pipeline_stall_s=0.0, far_tensor_s=0.0,
)  # fmt: skip

PAPERS = (
    Paper("GPT-3 175B", "gpt3-175b", "a100-80g", 1024, 2048, 1536, "tp=8,pp=16,dp=8,recompute=full,sp=false",
          "Megatron-LM README (2021)", "eager"),
    Paper("GPT 1T", "megatron-1t", "a100-80g", 3072, 2048, 3072, "tp=8,pp=64,dp=6,vpp=2,recompute=full,sp=false",
          "Narayanan et al. 2021, table 1", "eager"),
    Paper("Llama 3 405B, 8K", "llama3-405b", "h100-sxm", 8192, 8192, 2048, "tp=8,pp=16,dp=64,vpp=7,zero=2",
          "Grattafiori et al. 2024, table 4: 43 %", run=_LLAMA3),
    Paper("Llama 3 405B, 8K", "llama3-405b", "h100-sxm", 16384, 8192, 2048, "tp=8,pp=16,dp=128,vpp=7,zero=2",
          "Grattafiori et al. 2024, table 4: 41 %", run=_LLAMA3),
    Paper("Llama 3 405B, 128K", "llama3-405b", "h100-sxm", 16384, 131072, 128, "tp=8,cp=16,pp=16,dp=8,vpp=7,zero=2",
          "Grattafiori et al. 2024, table 4: 38 %", run=_LLAMA3),
)  # fmt: skip


def papers() -> list[Check]:
    """Print each; none of the authors' layouts may be predicted faster than what was found, if it fits."""
    lead = []
    for paper in PAPERS:
        cluster = autopar.ClusterSpec.preset(paper.cluster, gpus=paper.gpus)
        model = load_model(paper.model, dtype=torch.bfloat16, attention=paper.attention)
        predictor = Predictor(model, cluster, seq=paper.seq, global_batch=paper.global_batch, run=paper.run)
        theirs = predictor.predict(paper.layout)
        began = time.process_time()
        found = choose(predictor, {}, TIME_LIMIT_S)
        spent_s = time.process_time() - began
        faster = theirs.step_time_s / found.best.step_time_s
        lead += [faster] if theirs.fits else []
        tokens = f"batch {paper.global_batch} x {paper.seq}"
        print(f"{paper.name} on {paper.gpus} x {paper.cluster}, {tokens} ({paper.source})")
        print(f"  authors   {_figures(theirs)}  {short(theirs.layout)}")
        print(f"  found     {_figures(found.best)}  {short(found.best.layout)}")
        searched = f"{found.cells:,} sets of degrees, {spent_s:.1f} CPU s after the trace"
        print(f"  faster    by a factor of {faster:.3f}; gap {found.gap:.2%}, {searched}")
        print(f"  why       {_why(theirs, found.best)}", flush=True)
    return [Check("papers: found over authors' layout that fits, least", min(lead), 1.0, least=True)]


def _figures(one: Prediction) -> str:
    memory = f"{one.peak_bytes / 2**30:6.1f} GiB{'' if one.fits else ', too much'}"
    return f"{one.step_time_s:8.3f} s  MFU {one.mfu:6.1%}  {memory}"


def _why(theirs: Prediction, ours: Prediction) -> str:
    """The largest differences, in seconds of a step."""
    keys = [k for k in theirs.breakdown if k.endswith("_s")]
    change = sorted((ours.breakdown[k] - theirs.breakdown[k], k.removesuffix("_s")) for k in keys)
    large = [(s, k) for s, k in change if abs(s) >= 0.005 * theirs.step_time_s]
    return ", ".join(f"{k} {s:+.2f} s" for s, k in large) or "the same to half a percent"


def sweep() -> list[Check]:
    """Print each model, machine and batch; the free choice may nowhere be slower than the best that was tried."""
    print(f"{'model and machine':<32}{'tried, best':>12}{'free':>10}{'ratio':>8}   free choice")
    ratios = []
    for cases in _cells(sweep_cases()[0]):
        first = cases[0]
        predictor = Predictor(
            build(first.dims), cluster_of(first.machine), seq=first.dims.seq, global_batch=first.global_batch,
            run=run_of_case(first),
        )  # fmt: skip
        tried = [p for case in cases if (p := _tried(predictor, case)) is not None and p.fits]
        found = choose(predictor, {}, TIME_LIMIT_S)
        best_s = min((p.step_time_s for p in tried), default=float("inf"))
        ratios.append(best_s / found.best.step_time_s)
        print(
            f"{first.source:<32}{best_s:>12.3f}{found.best.step_time_s:>10.3f}"
            f"{best_s / found.best.step_time_s:>8.3f}   {short(found.best.layout)}",
            flush=True,
        )
    return [Check("sweep: free choice over the best that was tried, least", min(ratios), 1.0, least=True)]


def _cells(cases: Sequence[Case]) -> Iterator[list[Case]]:
    groups: dict[object, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.dims, case.machine, case.global_batch), []).append(case)
    yield from groups.values()


def _tried(predictor: Predictor, case: Case) -> Prediction | None:
    try:
        return predictor.predict(layout_of_case(case))
    except LayoutError:
        return None


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is asked for; 1 where what people did is predicted faster."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default all")
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    checks = [check for part in args.parts or PARTS for check in {"papers": papers, "sweep": sweep}[part]()]
    print("\n".join(map(str, checks)))
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
