"""Which part of the model each op and parameter belongs to: before the blocks, one of the blocks, after them.

A sample trace has three of many identical layers; the middle one stands for all of them. Of a model without such layers
each block is a part of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from autopar.blocks import BlockIndex, traced_blocks
from autopar.dataflow import Dataflow, is_backward, module_path
from autopar.trace import Sample
from autopar.tracing.repeated import LayerRuns

BEFORE, BLOCK, AFTER, OTHER = "before", "block", "after", "other"


@dataclass(frozen=True)
class Parts:
    """part_of: per op name, BEFORE, BLOCK (the middle layer), AFTER or OTHER (the layers that it stands for).

    own: the paths of traced blocks that are parts of their own, instead of the middle layer, first to last; they are
    called as `own_block` says. blocks: those of the model then, in order: path, and number of the traced one that
    stands for it.
    """

    part_of: dict[str, str]
    own: tuple[str, ...] = ()
    blocks: tuple[tuple[str, int], ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Of all blocks that are parts of their own."""
        return tuple(path for path, _ in self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parts that are priced, first to last."""
        return (BEFORE, *(map(own_block, range(len(self.own))) if self.own else (BLOCK,)), AFTER)

    def ops(self, flow: Dataflow, part: str, *, backward: bool) -> list[fx.Node]:
        """The ops of one part and pass, in order."""
        return [n for n in flow.ops if self.part_of[n.name] == part and is_backward(n) == backward]


def parts(sample: Sample) -> Parts:
    """Assign every real op. What lies between two layers belongs to the earlier one in order of execution."""
    flow = Dataflow.of(sample.trace)
    found: dict[str, str] = {}
    own = () if sample.layers else traced_blocks(sample.trace)
    index = BlockIndex(own)
    for backward in (False, True):
        nodes = [n for n in flow.ops if is_backward(n) == backward]
        paths = map(module_path, nodes)
        layers = [index.of(path) if own else layer_of(path, sample.layers) for path in paths]
        inside = [i for i, layer in enumerate(layers) if layer is not None]
        first, last = (inside[0], inside[-1]) if inside else (len(nodes), -1)
        current: int | None = None
        for i, (node, layer) in enumerate(zip(nodes, layers, strict=True)):
            current = layer if layer is not None else current
            if i < first or i > last:
                ahead = i < first
                found[node.name] = (AFTER if ahead else BEFORE) if backward else (BEFORE if ahead else AFTER)
            else:
                shared = BLOCK if current == sample.middle else OTHER
                found[node.name] = own_block(current) if own and current is not None else shared
    return Parts(found, own, tuple(_all_blocks(own, sample.runs)))


def _all_blocks(own: Sequence[str], runs: LayerRuns | None) -> Iterator[tuple[str, int]]:
    """The blocks of the whole model: (path, place in `own` of the one that was traced for it)."""
    for number, path in enumerate(own):
        place = None if runs is None else layer_of(f"{path}.", f"{runs.path}.")
        if runs is None or place is None:
            yield path, number
        else:
            yield from ((f"{runs.path}.{i}", number) for i, traced in enumerate(runs.stands()) if traced == place)


def own_block(number: int) -> str:
    """The part that one block is."""
    return f"{BLOCK} {number}"


def layer_of(path: str, layers: str) -> int | None:
    """The number of the layer that a module path lies in; None outside of the list of layers."""
    if not layers or not path.startswith(layers):
        return None
    number = path[len(layers) :].split(".", 1)[0]
    return int(number) if number.isdigit() else None


def leaf_modules(flow: Dataflow) -> frozenset[str]:
    """Module paths that no other path of the graph goes through."""
    paths = {module_path(n) for n in flow.ops} - {""}
    parents = {path[:at] for path in paths for at, char in enumerate(path) if char == "."}
    return frozenset(paths - parents)
