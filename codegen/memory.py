"""Simulates the memory of an emitted program, tensor by tensor, without running it.

The graphs carry fake results, so storages and their sizes are known. A storage lives from
the node that allocates it to the last use of any variable that refers to it, as in the
generated Python, which drops each variable after its last use; the operands of a
collective live until it is waited for. What the caller holds from outside, the whole
outputs and their gradients, lives to the end of the backward pass. What is alive all the
time (parameters, optimizer state, buffers, inputs) is added as a constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from autopar.codegen.builder import c10d, is_collective
from autopar.codegen.emit import EmittedProgram


@dataclass(frozen=True)
class MemoryPoint:
    """Bytes alive while one node runs. `node`: where it comes from in the joint graph, or its own name."""

    phase: str
    node: str
    activations: int  # made by the forward pass, or gradients of its outputs from outside
    gradients: int  # handed to the optimizer at the end
    temporaries: int  # the rest of the backward pass, conversions and collective buffers

    @property
    def total(self) -> int:
        """Sum of the categories."""
        return self.activations + self.gradients + self.temporaries


@dataclass(frozen=True)
class MemoryTimeline:
    """The memory of one training step on one rank; `constant_bytes` comes on top of every point."""

    constant_bytes: int
    points: tuple[MemoryPoint, ...]

    @property
    def peak(self) -> MemoryPoint:
        """The highest point."""
        return max(self.points, key=lambda p: p.total)

    @property
    def peak_bytes(self) -> int:
        """The highest total, constants included."""
        return self.constant_bytes + self.peak.total


def simulate_memory(program: EmittedProgram, constant_bytes: int) -> MemoryTimeline:
    """The memory time line of a forward and a backward pass of the emitted program."""
    persistent = _storages(n for n in program.forward.nodes if n.op == "placeholder")
    forward_kept = _output_storages(program.forward, program.saved)
    forward = _walk("forward", program.forward, persistent, {}, forward_kept)
    outputs = list(next(iter(program.forward.find_nodes(op="output"))).args[0])
    whole = _storages(outputs[: program.whole_outputs])
    inputs = program.backward.find_nodes(op="placeholder")[len(program.mesh) :]
    tangents = _storages(n for n, v in zip(inputs, program.backward_inputs, strict=True) if v[0] in program.tangents)
    carried = {s: size for s, size in {**forward_kept, **whole, **tangents}.items() if s not in persistent}
    grads = _output_storages(program.backward, program.grads)
    held = {**grads, **whole, **tangents}
    backward = _walk("backward", program.backward, persistent, carried, held)
    return MemoryTimeline(constant_bytes, (*forward, *backward))


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _tensors(item)]
    return []


def _storages(nodes: Iterable[fx.Node]) -> dict[int, int]:
    found = {}
    for node in nodes:
        for tensor in _tensors(node.meta.get("val")):
            storage = tensor.untyped_storage()
            found[StorageWeakRef(storage).cdata] = storage.nbytes()
    return found


def _output_storages(graph: fx.Graph, last: tuple[object, ...]) -> dict[int, int]:
    """Storages of the last len(last) outputs."""
    outputs = list(next(iter(graph.find_nodes(op="output"))).args[0])
    return _storages(n for n in outputs[len(outputs) - len(last) :] if isinstance(n, fx.Node))


def _walk(
    phase: str, graph: fx.Graph, persistent: dict[int, int], carried: dict[int, int], held_to_end: dict[int, int]
) -> list[MemoryPoint]:
    order = [n for n in graph.nodes if n.op != "output"]
    last_use = _last_uses(order)
    alive = dict(carried)
    made_forward = set(carried)
    points = []
    for time, node in enumerate(order):
        if node.op == "call_function":
            fresh = {s: b for s, b in _storages([node]).items() if s not in persistent and s not in alive}
            alive.update(fresh)
            if phase == "forward":
                made_forward |= set(fresh)
            points.append(_point(phase, node, alive, made_forward, held_to_end))
        for storage in [s for s in alive if last_use.get(s, -1) <= time and s not in held_to_end]:
            del alive[storage]
    return points


def _last_uses(order: list[fx.Node]) -> dict[int, int]:
    """Per storage, the time of the last node that still needs a variable of it."""
    times = {node: time for time, node in enumerate(order)}
    last: dict[int, int] = {}
    for node in order:
        end = max([times[node], *(times[u] for u in node.users if u in times)])
        for storage in _storages([node]):
            last[storage] = max(last.get(storage, 0), end)
        if is_collective(node):
            waited = max((times[u] for u in _waits(node)), default=times[node])
            for storage in _storages(node.all_input_nodes):
                last[storage] = max(last.get(storage, 0), waited)
    return last


def _waits(start: fx.Node) -> list[fx.Node]:
    users = [u for user in start.users for u in ([user, *user.users])]
    return [u for u in users if u.target is c10d.wait_tensor.default]


def _point(
    phase: str, node: fx.Node, alive: dict[int, int], made_forward: set[int], held_to_end: dict[int, int]
) -> MemoryPoint:
    activations = sum(b for s, b in alive.items() if s in made_forward)
    gradients = sum(b for s, b in alive.items() if s in held_to_end and s not in made_forward)
    rest = sum(alive.values()) - activations - gradients
    return MemoryPoint(phase, str(node.meta.get("origin", node.name)), activations, gradients, rest)
