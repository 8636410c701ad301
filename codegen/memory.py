"""Simulates the memory of an emitted program, tensor by tensor, without running it.

What waits on the host takes nothing here: it is gone once it was copied there, and again there once it was fetched.

The graphs carry fake results, so storages and their sizes are known. A storage lives from
the node that allocates it to the last use of any variable that refers to it, as in the
generated Python, which drops each variable after its last use; the operands of a
collective live until it is waited for. What the caller holds from outside, the whole
outputs and their gradients, lives to the end of the backward pass. What is alive all the
time (parameters, optimizer state, buffers, inputs) is added as a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from autopar.codegen.emit import EmittedProgram
from autopar.codegen.offload import is_on_host
from autopar.codegen.storages import last_uses, storages


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
    persistent = storages(n for n in program.forward.nodes if n.op == "placeholder")
    persistent |= storages(n for n in program.forward.nodes if is_on_host(n))  # not on the device at all
    forward_kept = _output_storages(program.forward, program.saved)
    forward = _walk("forward", program.forward, persistent, {}, forward_kept)
    outputs = list(next(iter(program.forward.find_nodes(op="output"))).args[0])
    whole = storages(outputs[: program.whole_outputs])
    inputs = program.backward.find_nodes(op="placeholder")[len(program.mesh) :]
    tangents = storages(n for n, v in zip(inputs, program.backward_inputs, strict=True) if v[0] in program.tangents)
    carried = {s: size for s, size in {**forward_kept, **whole, **tangents}.items() if s not in persistent}
    grads = _output_storages(program.backward, program.grads)
    held = {**grads, **whole, **tangents}
    backward = _walk("backward", program.backward, persistent, carried, held)
    return MemoryTimeline(constant_bytes, (*forward, *backward))


def _output_storages(graph: fx.Graph, last: tuple[object, ...]) -> dict[int, int]:
    """Storages of the last len(last) outputs."""
    outputs = list(next(iter(graph.find_nodes(op="output"))).args[0])
    return storages(n for n in outputs[len(outputs) - len(last) :] if isinstance(n, fx.Node))


def _walk(
    phase: str, graph: fx.Graph, persistent: dict[int, int], carried: dict[int, int], held_to_end: dict[int, int]
) -> list[MemoryPoint]:
    order = [n for n in graph.nodes if n.op != "output"]
    last_use = last_uses(order)
    alive = dict(carried)
    made_forward = set(carried)
    points = []
    for time, node in enumerate(order):
        if node.op == "call_function":
            fresh = {s: b for s, b in storages([node]).items() if s not in persistent and s not in alive}
            alive.update(fresh)
            if phase == "forward":
                made_forward |= set(fresh)
            points.append(_point(phase, node, alive, made_forward, held_to_end))
        for storage in [s for s in alive if last_use.get(s, -1) <= time and s not in held_to_end]:
            del alive[storage]
    return points


def _point(
    phase: str, node: fx.Node, alive: dict[int, int], made_forward: set[int], held_to_end: dict[int, int]
) -> MemoryPoint:
    activations = sum(b for s, b in alive.items() if s in made_forward)
    gradients = sum(b for s, b in alive.items() if s in held_to_end and s not in made_forward)
    rest = sum(alive.values()) - activations - gradients
    return MemoryPoint(phase, str(node.meta.get("origin", node.name)), activations, gradients, rest)
