"""Where a model may be cut into pipeline stages: the blocks that run one after the other, by module path.

A model says so by its numbered modules (layers of an encoder, then those of a decoder; residual blocks; the modules of
an `nn.Sequential`), or, where it has fewer than two of them, by the modules that it calls itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import nn

from autopar.dataflow import is_backward, module_path
from autopar.errors import LayoutError
from autopar.layouts import Layout
from autopar.segments import block_of
from autopar.trace import Trace
from autopar.tracing.repeated import repeated_layers

_SHOWN = 8  # names in an error


def blocks_of(model: nn.Module, trace: Trace) -> tuple[str, ...]:
    """The blocks of a model in the order in which they run; those of a list of many alike, where it has one."""
    repeated = repeated_layers(model)
    if repeated is not None:
        path, count = repeated
        return tuple(f"{path}.{i}" for i in range(count))
    return traced_blocks(trace)


def traced_blocks(trace: Trace) -> tuple[str, ...]:
    """The blocks that a trace shows, in the order in which they first run."""
    nodes = [n for n in trace.graph_module.graph.nodes if n.op == "call_function" and not is_backward(n)]
    paths = [path for path in dict.fromkeys(map(module_path, nodes)) if path]
    numbered = tuple(dict.fromkeys(block for path in paths if (block := block_of(path))))
    return numbered if len(numbered) > 1 else _called(paths)


def _called(paths: Sequence[str]) -> tuple[str, ...]:
    """The outermost modules of which there are several."""
    depth = max((path.count(".") + 1 for path in paths), default=0)
    levels = (tuple(dict.fromkeys(_head(path, d) for path in paths)) for d in range(1, depth + 1))
    return next((names for names in levels if len(names) > 1), ())


def _head(path: str, parts: int) -> str:
    return ".".join(path.split(".")[:parts])


class BlockIndex:
    """The number of the block that a module path lies in."""

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers = {name: number for number, name in enumerate(names)}

    def of(self, path: str) -> int | None:
        """None outside of all blocks."""
        while path:
            if path in self._numbers:
                return self._numbers[path]
            path = path.rpartition(".")[0]
        return None


def cut_counts(layout: Layout, names: Sequence[str]) -> tuple[int, ...]:
    """Blocks of every stage, as a layout's `cut` says; LayoutError where the model has no such boundary."""
    assert layout.cut is not None
    given = layout.cut.split("/")
    if len(given) == layout.pp:
        counts = tuple(map(int, given))
        if sum(counts) != len(names):
            raise LayoutError(
                f"layout: cut={layout.cut} is {sum(counts)} blocks, but the model has {len(names)}"
                f"{listed(names)}; give numbers that add up to {len(names)}"
            )
        return counts
    begins = [_boundary(layout.cut, name, names) for name in given]
    bounds = [0, *begins, len(names)]
    if bounds != sorted(bounds):
        raise LayoutError(f"layout: cut={layout.cut} is not in the order in which the blocks run{listed(names)}")
    return tuple(b - a for a, b in pairwise(bounds))


def _boundary(cut: str, name: str, names: Sequence[str]) -> int:
    if name in names:
        return list(names).index(name)
    inside = BlockIndex(names).of(name)
    why = f"lies inside of {names[inside]}, which cannot be cut" if inside is not None else "is no block of the model"
    raise LayoutError(f"layout: cut={cut}: {name} {why}; a stage may begin at {_legal(names)}")


def _legal(names: Sequence[str]) -> str:
    """Where stages may begin; the first one begins at the first block anyway."""
    return _shortened(names[1:]) if len(names) > 1 else "no module: the model is one block"


def listed(names: Sequence[str]) -> str:
    """Names in brackets, behind a word for them; not all where there are many."""
    return f" ({_shortened(names)})" if names else ""


def _shortened(names: Iterable[str]) -> str:
    every = list(names)
    if len(every) <= _SHOWN:
        return ", ".join(every)
    return f"{', '.join(every[: _SHOWN - 2])}, ... {every[-1]}"
