"""Write the error bars of reports: how far predictions are from published runs, by device, on one node and several.

    python benchmarks/published.py training sweep --json rows.json
    python benchmarks/calibrate.py rows.json        # writes autopar/explaining/measured_errors.json

A run without a prediction is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, too

from autopar.explaining.measured import where
from autopar.files import write_atomically
from benchmarks.published_models import cluster_of
from benchmarks.published_rows import Case, sweep_cases, training_cases

TARGET = Path(__file__).parent.parent / "autopar" / "explaining" / "measured_errors.json"
QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
LEAST_RUNS = 10  # fewer say nothing of a tenth
SWEEP = "nanotron, sweep over layouts (benchmarks/data/h100_sweep.json)"

Row = Mapping[str, Any]


def errors_by_device(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """What the file holds, from the rows of `published.py --json`: by device, then by `where`."""
    training, sweep = ({case.id: case for case in found[0]} for found in (training_cases(), sweep_cases()))
    cases: dict[str, Case] = {**training, **sweep}
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["error"] is not None:
            title = SWEEP if row["id"] in sweep else row["source"]
            cluster = cluster_of(cases[row["id"]].machine)
            groups[cluster.device.name, where(cluster.nodes)].append({**row, "source": title})
    made: dict[str, dict[str, Any]] = defaultdict(dict)
    for (name, place), found in sorted(groups.items()):
        if len(found) >= LEAST_RUNS:
            made[name][place] = _errors(found)
    return dict(made)


def _errors(rows: Sequence[Row]) -> dict[str, Any]:
    memory = [1 / (1 + row["peak_error"]) for row in rows if row["peak_error"] is not None]
    gpus = [row["gpus"] for row in rows]
    return {
        "runs": len(rows),
        "memory_runs": len(memory),
        "gpus": [min(gpus), max(gpus)],
        "median_error": round(float(np.median([abs(row["error"]) for row in rows])), 4),
        "time": _quantiles([1 / (1 + row["error"]) for row in rows]),
        "memory": _quantiles(memory) if len(memory) >= LEAST_RUNS else {},
        "sources": dict(Counter(row["source"] for row in rows).most_common()),
    }


def _quantiles(ratios: Sequence[float]) -> dict[str, float]:
    """Of measured over predicted."""
    return {str(q): round(float(np.quantile(ratios, q)), 4) for q in QUANTILES}


def main(argv: Sequence[str] | None = None) -> int:
    """Read the rows, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, metavar="FILE", help="what published.py --json wrote")
    parser.add_argument("-o", "--output", type=Path, default=TARGET, metavar="FILE", help=f"default {TARGET.name}")
    args = parser.parse_args(argv)
    devices = errors_by_device(json.loads(args.rows.read_text(encoding="utf-8")))
    data = {"made_by": "benchmarks/calibrate.py", "devices": devices}
    write_atomically(args.output, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    for name, places in devices.items():
        for place, one in places.items():
            print(f"{name}, {place}: {one['runs']} runs; measured / predicted by quantile: {one['time']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
