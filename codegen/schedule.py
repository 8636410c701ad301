"""Emission under a memory limit: large buckets and overlap where their buffers fit, else small ones, else neither."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autopar.codegen.beside import compute_beside
from autopar.codegen.emit import EmittedProgram, emit
from autopar.codegen.flat import fill_in_place
from autopar.codegen.inplace import write_in_place
from autopar.codegen.memory import MemoryTimeline, simulate_memory
from autopar.codegen.overlap import overlap
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.memory_types import MemoryEstimate
from autopar.opcost import local_bytes
from autopar.placements import replicated
from autopar.plan_types import Decisions
from autopar.trace import Trace


@dataclass(frozen=True)
class PersistentMemory:
    """Bytes of one rank that are there all the time."""

    parameters: int
    optimizer: int
    buffers: int
    inputs: int

    @property
    def total(self) -> int:
        """Sum of the categories."""
        return self.parameters + self.optimizer + self.buffers + self.inputs


def persistent_memory(
    trace: Trace, decisions: Decisions, mesh: tuple[int, ...], optimizer: OptimizerSpec
) -> PersistentMemory:
    """Parameters and optimizer state in their stored states; buffers, constants and the global batch whole."""
    tensors = {n.name: n.meta["val"] for n in trace.graph_module.graph.nodes if n.op == "placeholder"}
    whole = replicated(len(mesh))

    def size(node: str) -> int:
        return local_bytes(tensors[node], whole, mesh)

    parameters = state = 0
    for param in trace.params:
        nbytes = local_bytes(tensors[param.node], decisions.params[param.fqn], mesh)
        parameters += nbytes
        state += optimizer.state_bytes(nbytes) if param.fqn in trace.grads else 0
    buffers = sum(size(b.node) for b in trace.buffers) + sum(size(c.node) for c in trace.constants)
    inputs = sum(size(i.node) for i in trace.inputs)
    return PersistentMemory(parameters, state, buffers, inputs)


def emit_within(
    trace: Trace,
    decisions: Decisions,
    mesh: tuple[int, ...],
    costs: CostModel,
    persistent_bytes: int,
    limit_bytes: int | None,
) -> tuple[EmittedProgram, MemoryTimeline]:
    """The emitted program and its simulated memory; overlapped and bucketed if that stays within the limit."""
    with torch.no_grad():
        large, small = costs.bucket_bytes, costs.bucket_bytes // 4
        moved = True
        for bucket_bytes, overlapped, beside in (
            (large, True, True), (large, True, False), (small, True, False), (small, False, False), (0, False, False),
        ):  # fmt: skip
            if (bucket_bytes, overlapped, beside) == (large, True, False) and not moved:
                continue  # nothing else than what did not fit
            program = emit(trace, decisions, mesh, costs, bucket_bytes=bucket_bytes)
            if overlapped:
                overlap(program.forward)
                overlap(program.backward)
            if beside:
                moved = compute_beside(program.backward)
            fill_in_place(program.backward)
            write_in_place(program)
            timeline = simulate_memory(program, persistent_bytes)
            if limit_bytes is None or timeline.peak_bytes <= limit_bytes or bucket_bytes == 0:
                break
    return program, timeline


def memory_estimate(persistent: PersistentMemory, timeline: MemoryTimeline) -> MemoryEstimate:
    """The peak of a program and what it is made of."""
    peak = timeline.peak
    categories = {
        "parameters": persistent.parameters,
        "gradients": peak.gradients,
        "optimizer": persistent.optimizer,
        "activations": peak.activations,
        "temporaries": peak.temporaries,
        "buffers": persistent.buffers,
        "inputs": persistent.inputs,
    }
    return MemoryEstimate(timeline.peak_bytes, categories, peak.phase, peak.node)
