"""Which ops run as one kernel.

Elementwise ops, norms and softmaxes are fused with what makes their operands, as torch.compile or the hand-written
kernels of training frameworks do: what only the group itself uses is never written to memory.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from autopar.cost.compute import OpClass, op_class
from autopar.dataflow import Dataflow, result_metas

_FUSABLE = (OpClass.ELEMENTWISE, OpClass.REDUCTION, OpClass.RANDOM)
_ALONE = ("nll_loss", "cumsum", "embedding")


FUSION = ("none", "modules", "all")


def groups(
    flow: Dataflow,
    ops: list[fx.Node],
    grows: Callable[[fx.Node], bool],
    fusion: str,
    alike: Callable[[fx.Node, fx.Node], bool],
) -> list[list[fx.Node]]:
    """The ops in kernels, in order of each kernel's last op.

    grows: whether an op's first result grows with the batch: a sum over tokens is a kernel of its own.
    fusion: "none", "modules" (what is written as a module of its own, a norm or an activation, is one kernel, and so
        is what lies between the two products of attention that keeps its scores) or "all".
    alike: whether two ops are of one such module.
    """
    kernel_of: dict[fx.Node, int] = {}
    kernels: list[list[fx.Node]] = []
    before: list[set[int]] = []  # per kernel, those it depends on
    for node in ops:
        sources = [kernel_of[o.node] for o in flow.operands_of[node] if o.node in kernel_of]
        joined = _group_to_join(node, sources, kernels, before, grows) if fusion != "none" else None
        if joined is not None and fusion == "modules" and not all(alike(node, n) for n in kernels[joined]):
            joined = None
        if joined is None:
            joined = len(kernels)
            kernels.append([])
            before.append(set())
        kernels[joined].append(node)
        kernel_of[node] = joined
        for source in sources:
            if source != joined:
                before[joined] |= {source} | before[source]
    place = {node: i for i, node in enumerate(ops)}
    return sorted(kernels, key=lambda kernel: place[kernel[-1]])


def _group_to_join(
    node: fx.Node,
    sources: list[int],
    kernels: list[list[fx.Node]],
    before: list[set[int]],
    grows: Callable[[fx.Node], bool],
) -> int | None:
    if not is_fusable(node) or not grows(node):
        return None
    for candidate in sorted(set(sources), reverse=True):
        others = [s for s in sources if s != candidate]
        if any(candidate in before[s] for s in others):
            continue  # it would have to run both before and after another kernel
        if all(is_fusable(n) and grows(n) for n in kernels[candidate]):
            return candidate
    return None


def is_fusable(node: fx.Node) -> bool:
    """Whether the op is of a kind that code generators fuse."""
    name = str(node.target)
    return op_class(node.target) in _FUSABLE and not any(word in name for word in _ALONE) and bool(result_metas(node))
