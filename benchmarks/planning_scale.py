"""What the search over layouts costs as the cluster grows: CPU seconds after the trace.

    python benchmarks/planning_scale.py                     # the table; exits with 1 beyond its limits
    python benchmarks/planning_scale.py --svg scale.svg     # and as a picture

Llama-3 8B on 8 to 16,384 H100 with 4 sequences a device (64 at least): the search must grow slower than linearly in
devices. And one known search: GPT 530B on 5,128 A100, batch 2,520, which Calculon (Isaev et al. 2023) searches in 46
CPU seconds over 8,112 layouts on a machine of this kind.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import autopar
from autopar.choosing.plan import choose
from autopar.choosing.search import LayoutChoice
from autopar.layout_text import short
from autopar.models import load_model
from autopar.predicting.predict import Predictor

COUNTS = (8, 32, 128, 512, 2048, 8192, 16384)
MOST_530B_CPU_S, MOST_GAP = 6.0, 0.01
TIME_LIMIT_S = 300.0


@dataclass(frozen=True)
class Point:
    """One search: CPU seconds, and what it found."""

    gpus: int
    cpu_s: float
    found: LayoutChoice


def search(model: str, cluster: str, gpus: int, seq: int, global_batch: int) -> Point:
    """Trace, then measure the search alone."""
    spec = autopar.ClusterSpec.preset(cluster, gpus=gpus)
    predictor = Predictor(load_model(model, dtype=torch.bfloat16), spec, seq=seq, global_batch=global_batch)
    began = time.process_time()
    found = choose(predictor, {}, TIME_LIMIT_S)
    return Point(gpus, time.process_time() - began, found)


def line(name: str, point: Point) -> str:
    """One row of the table."""
    found = point.found
    return (
        f"{name:<14}{point.gpus:>7}{point.cpu_s:>9.2f}{found.cells:>10,}{found.visited:>9,}{found.priced:>9,}"
        f"{found.gap:>8.2%}{found.best.step_time_s:>10.3f} s   {short(found.best.layout)}"
    )


def picture(points: Sequence[Point]) -> str:
    """CPU seconds over devices, both logarithmic, as SVG; the dashed line grows linearly."""
    width, height, left, low = 640, 360, 70, 310
    xs = [math.log2(p.gpus / points[0].gpus) for p in points]
    floor = min(p.cpu_s for p in points) / 2
    ratio = points[-1].gpus / points[0].gpus
    top = math.log2(points[0].cpu_s * ratio / floor)

    def at(x: float, seconds: float) -> tuple[float, float]:
        return left + x / xs[-1] * (width - left - 30), low - math.log2(seconds / floor) / top * (low - 30)

    dots = [at(x, p.cpu_s) for x, p in zip(xs, points, strict=True)]
    linear = at(0, points[0].cpu_s), at(xs[-1], points[0].cpu_s * ratio)
    labels = [
        f'<text x="{x:.0f}" y="{low + 22}" text-anchor="middle">{p.gpus}</text>'
        f'<text x="{x:.0f}" y="{y - 10:.0f}" text-anchor="middle">{p.cpu_s:.2g} s</text>'
        for (x, y), p in zip(dots, points, strict=True)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="12">',
        "<title>CPU seconds of the search over layouts by number of devices</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} 20V{low}H{width - 20}" fill="none" stroke="#999"/>',
        f'<path d="M{linear[0][0]:.1f} {linear[0][1]:.1f}L{linear[1][0]:.1f} {linear[1][1]:.1f}" stroke="#bbb"'
        ' stroke-dasharray="5 5" fill="none"/>',
        f'<text x="{linear[1][0] - 70:.0f}" y="{linear[1][1] + 12:.0f}" fill="#777">linear</text>',
        f'<polyline points="{path}" fill="none" stroke="#1f5fa8" stroke-width="2"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#1f5fa8"/>' for x, y in dots),
        *labels,
        f'<text x="{(left + width) / 2:.0f}" y="{height - 8}" text-anchor="middle">devices</text>',
        f'<text x="16" y="{low / 2:.0f}" transform="rotate(-90 16 {low / 2:.0f})" text-anchor="middle">'
        "CPU seconds</text>",
        "</svg>",
        "",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 beyond its limits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture to FILE")
    args = parser.parse_args(argv)
    print(f"{'model':<14}{'GPUs':>7}{'CPU s':>9}{'degrees':>10}{'visited':>9}{'priced':>9}{'gap':>8}{'step':>10}")
    points = []
    for gpus in COUNTS:
        points.append(search("llama3-8b", "h100-sxm", gpus, 8192, max(64, 4 * gpus)))
        print(line("llama3-8b", points[-1]), flush=True)
    known = search("megatron-530b", "a100-80g", 5128, 2048, 2520)
    print(line("megatron-530b", known))
    if args.svg is not None:
        args.svg.write_text(picture(points), encoding="utf-8")
    growth = math.log(points[-1].cpu_s / points[0].cpu_s) / math.log(points[-1].gpus / points[0].gpus)
    print(
        f"from {points[0].gpus} to {points[-1].gpus} devices, CPU seconds grow as devices to the power of {growth:.2f}"
    )
    good = growth < 1 and known.cpu_s <= MOST_530B_CPU_S and max(p.found.gap for p in (*points, known)) <= MOST_GAP
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
