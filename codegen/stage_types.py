"""What a pipeline stage runs: plain data between the cut of a program and whoever runs its stages."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from autopar.codegen.emit import Version
from autopar.codegen.storages import storages_of


@dataclass(frozen=True)
class Message:
    """What one stage hands to its neighbour for one micro-batch, in this order; local tensors of one rank.

    A rank sends to the rank of the same coordinates in the neighbour's mesh. tensors: fake, of local shape and
    contiguous. A value that a later neighbour needs is among those of every stage on its way.
    """

    values: tuple[Version, ...]
    tensors: tuple[torch.Tensor, ...]


NOTHING = Message((), ())


@dataclass(frozen=True)
class StagePass:
    """One rank-local graph: placeholders (mesh coordinates first) for `inputs`, results as said by its stage.

    inputs: a placeholder of the joint graph (parameter, buffer, constant, input, tangent), a received value, or a
        value that an earlier pass of the same stage and micro-batch left in `saved`; each as (name, state).
    """

    graph: fx.Graph
    inputs: tuple[Version, ...]


@dataclass(frozen=True)
class StageProgram:
    """One stage of a pipeline, on one rank of its mesh.

    forward: (..) -> (*sends_forward, *outputs, *saved_forward).
    backward: what the stage before waits for, (..) -> (*sends_backward, *grads_early, *saved_backward).
    weights: what nobody waits for, (..) -> (*grads_late). An ordinary backward pass runs `backward`, then `weights`.
    reduce: once a step, (*summed gradients of all micro-batches, in the order grads_early, grads_late) -> gradients as
        the parameters are stored: the reductions over mesh axes that need not be made for each micro-batch.
    receives_forward / receives_backward: from the stage before / behind; sends_forward / sends_backward: to the stage
        behind / before.
    gather: once a step, before all passes: what these take of parameters that are stored in parts, by the versions in
        `gathered`; None where each micro-batch gathers what it needs.
    params: names of the parameters that its passes take. outputs: node names of model outputs and buffer updates made
        here, in the order in which `forward` returns them.
    """

    index: int
    mesh: tuple[int, ...]
    forward: StagePass
    backward: StagePass
    weights: StagePass
    reduce: fx.Graph
    receives_forward: Message
    sends_forward: Message
    receives_backward: Message
    sends_backward: Message
    saved_forward: tuple[Version, ...]
    saved_backward: tuple[Version, ...]
    params: tuple[str, ...]
    outputs: tuple[str, ...]
    grads_early: tuple[str, ...]
    grads_late: tuple[str, ...]
    gather: StagePass | None = None
    gathered: tuple[Version, ...] = ()


@dataclass(frozen=True)
class PipelineProgram:
    """All stages of a model, first to last, and who owns what.

    owners: parameter name -> the stage that stores it, with its gradient and optimizer state: the first that takes it.
        Another stage that takes it (tied embeddings) gets its value at the start of a step, and its gradient there is
        added to the owner's at the end (before `reduce`'s result is handed out: both are in the stored state).
    """

    mesh: tuple[int, ...]
    stages: tuple[StageProgram, ...]
    owners: dict[str, int]


def own_gradients(program: StageProgram) -> set[str]:
    """Parameters whose gradient is the only result that lies in its memory, all of it, and that its pass makes."""
    found = set()
    sends = len(program.sends_backward.values)
    for graph, names, first in (
        (program.backward.graph, program.grads_early, sends),
        (program.weights.graph, program.grads_late, 0),
    ):
        results: list[fx.Node] = list(graph.output_node().args[0])  # type: ignore[arg-type]
        taken = Counter(
            storage
            for node in (*(n for n in graph.nodes if n.op == "placeholder"), *results)
            for storage in storages_of(node.meta.get("val"))
        )
        for name, node in zip(names, results[first:], strict=False):
            ((storage, nbytes),) = storages_of(node.meta["val"]).items()
            if taken[storage] == 1 and nbytes == node.meta["val"].nbytes:
                found.add(name)
    return found


def gradient_dtypes(program: StageProgram) -> dict[str, torch.dtype]:
    """Of the gradients that its passes make, by parameter."""
    names = (*program.grads_early, *program.grads_late)
    summed = program.reduce.find_nodes(op="placeholder")[len(program.mesh) :]
    return {name: node.meta["val"].dtype for name, node in zip(names, summed, strict=True)}


def wider(dtype: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    """The wider of two floating dtypes; the first where they are as wide."""
    return other if other is not None and other.itemsize > dtype.itemsize else dtype
