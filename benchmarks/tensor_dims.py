"""Bytes that a rank sends for one wide MLP layer, cut in one to three dimensions: emitted programs beside theory.

    python benchmarks/tensor_dims.py             # the tables; exits with 1 where they differ
    python benchmarks/tensor_dims.py --json out.json

The layer is the difference between a stack of three and a stack of two, so that input and loss do not count. The
planner's own choice stands beside them, without a memory limit: its bytes, peak memory, time, and which dim each axis
cuts in the two products (rows M, columns N, summed K). Programs are planned on `gb200-nvl72` (one NVLink domain),
float32, emitted, and their collectives counted on the graphs. Theory:
1D as Megatron-LM (Shoeybi et al. 2019), 2D as SUMMA with gathers (van de Geijn and Watts 1997; Xu et al. 2021), 2.5D
(Solomonik and Demmel 2011; Wang et al. 2021), 3D (Agarwal et al. 1995; Bian et al. 2021).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, too

import torch

import autopar
from benchmarks.tensor_products import (
    Measured,
    Scheme,
    Sizes,
    Stack,
    layer_theory,
    measure,
    scheme_pins,
    schemes,
    stack_trace,
)

RANKS = (4, 8, 16, 64)
WIDE = Sizes(rows=8192, width=16384, inner=65536)
CLUSTER = "gb200-nvl72"
# Bandwidth as in Colossal-AI's documentation (docs/source/en/features/*_tensor_parallel.md), as it stands there: of one
# product whose three matrices are of one size, in a unit that is that size only for 1D and 3D.
COLOSSAL = {"1D": "2(p-1)/p", "2D": "6(q-1)/q", "2.5D": "3(q-1)(d+1)/(dq)", "3D": "6(q-1)/q^3"}


@dataclass(frozen=True)
class Row:
    """One scheme: the layer's bytes by emitted program, plan and theory, the whole program's figures, and what the
    planner does on the same mesh when nothing is prescribed."""

    scheme: Scheme
    emitted_bytes: int
    planned_bytes: int
    theory_bytes: int
    three: Measured
    free: Measured
    free_bytes: int

    @property
    def exact(self) -> bool:
        """Whether all three counts of bytes are the same."""
        return self.emitted_bytes == self.planned_bytes == self.theory_bytes


def rows_of(ranks: int, sizes: Sizes) -> list[Row]:
    """All schemes of a number of ranks."""
    two, three = stack_trace(sizes, 2), stack_trace(sizes, 3)
    cluster = autopar.ClusterSpec.preset(CLUSTER, gpus=ranks)
    found = []
    for scheme in schemes(ranks):
        pins = scheme_pins(scheme, sizes)
        fewer, more = (measure(t, cluster, scheme.mesh, pins) for t in (two, three))
        free_fewer, free = (measure(t, cluster, scheme.mesh) for t in (two, three))
        found.append(
            Row(
                scheme,
                int(more.emitted_bytes - fewer.emitted_bytes),
                int(more.planned_bytes - fewer.planned_bytes),
                int(layer_theory(scheme, sizes)),
                more,
                free,
                int(free.emitted_bytes - free_fewer.emitted_bytes),
            )
        )
    return found


def line(row: Row) -> str:
    """One row of the table."""
    mesh = "x".join(map(str, row.scheme.mesh))
    mib = 2**20
    return (
        f"{row.scheme.name:<6}{mesh:>8}{row.emitted_bytes / mib:>11.1f}{row.planned_bytes / mib:>10.1f}"
        f"{row.theory_bytes / mib:>10.1f}{'  =' if row.exact else '  !'}{row.three.params_bytes / mib:>10.0f}"
        f"{row.three.peak_bytes / mib:>9.0f}{row.three.step_s * 1e3:>9.2f}{row.free_bytes / mib:>10.1f}"
        f"{row.free.peak_bytes / mib:>9.0f}{row.free.step_s * 1e3:>9.2f}  {'/'.join(row.free.cuts)}"
    )


HEAD = (
    "scheme    mesh    emitted   planned    theory    weights     peak  step ms      free     peak  step ms  cuts\n"
    "                     MiB       MiB       MiB        MiB      MiB               MiB      MiB"
)


def picked(ranks: int) -> str:
    """What the whole search picks for two layers, and how much faster that is than the best plan on one axis."""
    with torch.device("meta"):
        model, x = Stack(WIDE, 2), torch.empty(WIDE.rows, WIDE.width)
    cluster = autopar.ClusterSpec.preset(CLUSTER, gpus=ranks)
    plan = autopar.plan(model, cluster, example_inputs=((x,), {}), optimizer="none")
    one = measure(stack_trace(WIDE, 2), cluster, (ranks,))
    tried = Counter(len(c.mesh) for c in plan.candidates)
    meshes = ", ".join(f"{count} of {axes} axes" for axes, count in sorted(tried.items()))
    return (
        f"the planner's pick among all meshes ({meshes}): {'x'.join(map(str, plan.mesh))}, "
        f"{plan.objective_s * 1e3:.2f} ms, {one.step_s / plan.objective_s - 1:.1%} faster than on one axis "
        f"(gap {plan.gap:.2%})"
    )


def as_json(row: Row) -> dict[str, Any]:
    """The figures of a row."""
    return {
        "scheme": row.scheme.name,
        "mesh": list(row.scheme.mesh),
        "emitted_bytes": row.emitted_bytes,
        "planned_bytes": row.planned_bytes,
        "theory_bytes": row.theory_bytes,
        "weights_bytes": row.three.params_bytes,
        "peak_bytes": row.three.peak_bytes,
        "step_s": row.three.step_s,
        "free_bytes": row.free_bytes,
        "free_peak_bytes": row.free.peak_bytes,
        "free_step_s": row.free.step_s,
        "free_cuts": list(row.free.cuts),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found: dict[int, list[Row]] = {}
    print(f"bytes a rank sends in a layer of {WIDE.rows} x {WIDE.width} x {WIDE.inner}, forward and backward")
    for ranks in args.ranks:
        found[ranks] = rows_of(ranks, WIDE)
        print(f"\n{ranks} ranks\n{HEAD}")
        for row in found[ranks]:
            print(line(row))
        print(picked(ranks))
    print("\nColossal-AI's own analysis, one product:", ", ".join(f"{k} {v}" for k, v in COLOSSAL.items()))
    if args.json:
        data = {ranks: [as_json(r) for r in rows] for ranks, rows in found.items()}
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    wrong = [r for rows in found.values() for r in rows if not r.exact or r.free.step_s > r.three.step_s * (1 + 1e-3)]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
