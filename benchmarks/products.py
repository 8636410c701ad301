"""Products of matrices in float32 on one core: torch's (`aten.mm`) beside the one that programs take (oneDNN's).

    python benchmarks/products.py

Each line: rows of the first factor, then per shape of the weight (in x out) how many times as fast the program's
product is, forward (x @ weight.T) and for the gradient of its input (gradient @ weight), medians of 15 that take
turns. `codegen/products.py` takes oneDNN's from 8 rows and 2**24 multiplications on; what it leaves is in brackets.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script, too

import torch
import transformers.integrations.moe  # noqa: F401  defines its grouped products
from torch import fx

from autopar.codegen import grouped as grouped  # defines the ops
from autopar.codegen.products import onednn_product, take_faster_products

ROWS = (1, 8, 64, 256, 1024, 2048)
SHAPES = ((64, 256), (384, 384), (384, 1536), (1536, 384), (2048, 2048))
_ROUNDS = 15


def product(x: torch.Tensor, matrix: torch.Tensor) -> fx.GraphModule:
    """x @ matrix, as a program would do it."""
    graph = fx.Graph()
    places = []
    for name, tensor in (("x", x), ("matrix", matrix)):
        places.append(graph.placeholder(name))
        places[-1].meta["val"] = tensor
    made = graph.call_function(torch.ops.aten.mm.default, tuple(places))
    made.meta["val"] = x @ matrix
    graph.output(made)
    take_faster_products(graph)
    return fx.GraphModule({}, graph)


def compared(x: torch.Tensor, matrix: torch.Tensor) -> str:
    """How many times as fast the program's product is."""
    ours = product(x, matrix)
    swapped = not any(n.target is torch.ops.aten.mm.default for n in ours.graph.nodes)
    ratio = times_as_fast(lambda: (ours if swapped else onednn_product)(x, matrix), lambda: torch.mm(x, matrix))
    return f"{ratio:.2f}" if swapped else f"({ratio:.2f})"


def times_as_fast(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """Median seconds of the second over those of the first; they take turns."""
    both = (ours, theirs)
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(-2, _ROUNDS):
        for which in (0, 1) if turn % 2 else (1, 0):
            began = time.perf_counter()
            both[which]()
            if turn >= 0:
                seconds[which].append(time.perf_counter() - began)
    return statistics.median(seconds[1]) / statistics.median(seconds[0])


def of_groups(rows: int, k: int, n: int) -> str:
    """The product of two groups, and its gradients."""
    theirs, ours = torch.ops.transformers, torch.ops.autopar
    x, matrices, gradient = torch.randn(2 * rows, k), torch.randn(2, n, k).transpose(1, 2), torch.randn(2 * rows, n)
    given = (x, matrices, torch.tensor([rows, 2 * rows]))
    forward = times_as_fast(lambda: ours.grouped_product(*given), lambda: theirs.grouped_mm_fallback(*given))
    given = (*given, gradient)  # type: ignore[assignment]
    backward = times_as_fast(
        lambda: ours.grouped_product_backward(*given), lambda: theirs.grouped_mm_fallback_backward(*given)
    )
    return f"{forward:.2f} {backward:.2f}"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("rows", *(f"{k} x {n}".rjust(14) for k, n in SHAPES), sep="  ")
    for rows in ROWS:
        cells = []
        for k, n in SHAPES:
            weight = torch.randn(n, k)
            cells.append(f"{compared(torch.randn(rows, k), weight.t())} {compared(torch.randn(rows, n), weight)}")
        print(f"{rows:4}", *(c.rjust(14) for c in cells), sep="  ")
    print("groups")
    for rows in (64, 512):
        cells = [of_groups(rows, k, n) for k, n in SHAPES]
        print(f"{rows:4}", *(c.rjust(14) for c in cells), sep="  ")


if __name__ == "__main__":
    main()
