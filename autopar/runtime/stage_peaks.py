"""How many bytes each rank of a pipeline holds at most: what is there at all times, and what its passes hold."""

from __future__ import annotations

from autopar.codegen.stage_memory import peak_of_passes
from autopar.cost.optimizer import OptimizerSpec
from autopar.opcost import local_bytes
from autopar.runtime.staged import CompiledStages


def peak_bytes_per_stage(compiled: CompiledStages) -> tuple[int, ...]:
    """Of tensors on one rank of each pipeline rank, first to last, while a step runs and the optimizer has its state.

    Simulated on the emitted graphs, in the order in which they are executed: what `measure_peak` measures, without
    what an allocator or a library takes beside tensors.
    """
    pipeline, trace = compiled.pipeline, compiled.trace
    states = 1 + OptimizerSpec(compiled.plan.options.optimizer).states_per_param
    mesh = pipeline.program.mesh
    fake = {n.name: n.meta["val"] for n in trace.graph_module.graph.nodes if n.op == "placeholder"}
    sizes = {p.fqn: local_bytes(fake[p.node], compiled.params[p.fqn], mesh) for p in trace.params}
    always = sum(fake[b.node].nbytes for b in trace.buffers)
    always += sum(fake[i.node].nbytes * (pipeline.micro_batches if i.batch_dim == 0 else 1) for i in trace.inputs)
    always += sum(fake[tangent].nbytes for tangent in trace.tangents) * pipeline.micro_batches
    found = []
    for rank in range(len(pipeline.schedule.steps)):
        owned = sum(size for name, size in sizes.items() if pipeline.owner(name) == rank)
        borrowed = sum(sizes[one.name] for one in pipeline.tied if rank in one.users)
        passes = peak_of_passes(pipeline.stages_of(rank), pipeline.schedule.steps[rank], pipeline.sum_dtype)
        found.append(always + owned * states + borrowed + passes)
    return tuple(found)
