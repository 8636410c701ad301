"""The folder that `dump_dir=` names: trace, problem, plan and program of one plan."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.dataflow import is_backward, module_path, result_metas, value_name
from autopar.dumping.problem import problem_text
from autopar.dumping.source import Remark, docstring_of, python_source, tensor_text
from autopar.errors import AutoparError
from autopar.pins import parse_pins, resolve_pins
from autopar.placements import State
from autopar.plans import Plan
from autopar.sharding import build_problem
from autopar.trace import Trace
from autopar.tracing.diagnose import source_line

_NOTE = "Written by autopar. The file is code: importing it runs it. `autopar.dumping.parse.read_python` only reads it."


@dataclass(frozen=True)
class DumpedPass:
    """One emitted graph: `inputs` and `outputs` in words, `modules` behind its call_module nodes."""

    graph: fx.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    modules: Mapping[str, fx.GraphModule] = field(default_factory=dict)


def write_stages(folder: str | Path, trace: Trace, plan: Plan, passes: Mapping[str, DumpedPass]) -> None:
    """Write 01_trace.py, 02_problem.json, 03_plan.json and 04_program_rank0_PASS.py; raises AutoparError.

    passes: the emitted graphs, "forward" and "backward". They are the same on all ranks, which differ in their
    coordinates only: the first inputs.
    """
    files = {
        "01_trace.py": trace_source(trace, plan),
        "02_problem.json": _problem(trace, plan),
        "03_plan.json": plan.dumps(),
        **{f"04_program_rank0_{name}.py": program_source(trace, plan, name, p) for name, p in passes.items()},
    }
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise AutoparError(f"cannot write to dump_dir {folder}: {error.strerror or error}; name another") from error


def _problem(trace: Trace, plan: Plan) -> str:
    """As it was stated on the mesh of the plan."""
    pins = resolve_pins(parse_pins(plan.options.pin, plan.devices), trace, plan.mesh)
    costs, optimizer = CostModel(plan.cluster, plan.mesh), OptimizerSpec(plan.options.optimizer)
    stated = build_problem(trace, costs, optimizer, capacity_bytes=plan.options.memory_limit_bytes, pins=pins)
    return problem_text(stated)


def trace_source(trace: Trace, plan: Plan | None = None) -> str:
    """The joint graph as Python; with the placements of a plan, if there is one."""
    roles = [f"{p.node}: parameter {p.fqn}{''.join(f' = {t}' for t in p.tied)}" for p in trace.params]
    roles += [f"{b.node}: buffer {b.fqn}" for b in trace.buffers]
    roles += [f"{c.node}: constant {c.fqn or 'of the code'}" for c in trace.constants]
    roles += [f"{i.node}: input {i.path}" for i in trace.inputs]
    results = [f"{o.path} = {o.node}" for o in trace.outputs if o.node is not None]
    results += [f"new {fqn} = {node}" for fqn, node in trace.buffer_updates.items()]
    results += [f"gradient of {fqn} = {node}" for fqn, node in trace.grads.items()]
    lines = ["The joint forward and backward graph of the model, on one device.", "", _NOTE, "", "Takes:", *roles]
    states = _states(trace, plan) if plan else {}

    def remark(node: fx.Node) -> Remark:
        result = tensor_text(node.meta.get("val")) or ", ".join(tensor_text(t) for t in result_metas(node))
        state = states.get(node.name)
        return Remark(_place(node), f"{result}  {', '.join(state)}" if state else result)

    docstring = docstring_of([*lines, "Returns:", *results])
    return python_source(trace.graph_module.graph, docstring, remark)


def program_source(trace: Trace, plan: Plan, name: str, emitted: DumpedPass) -> str:
    """The emitted graph of one pass as Python, with the placement and the user's line of each op."""
    nodes = {n.name: n for n in trace.graph_module.graph.nodes}
    mesh = "x".join(map(str, plan.mesh)) or "1"
    lines = [
        f"The {name} pass of one rank on a mesh of {mesh}.",
        "",
        _NOTE,
        "coordN is this rank's coordinate on mesh axis N; 'autopar.axisN' stands for the process group of the axis.",
        "",
        *_wrapped("Takes: ", emitted.inputs),
        *_wrapped("Returns: ", emitted.outputs),
    ]
    states = _states(trace, plan)

    def remark(node: fx.Node) -> Remark:
        origin = nodes.get(str(node.meta.get("origin", "")).partition("#")[0])
        version = node.meta.get("version")
        state = version[2] if version else states.get(node.name) if node.op == "placeholder" else None
        result = tensor_text(node.meta.get("val"))
        placed = f"{result}  {', '.join(state)}" if state else result
        return Remark(_place(origin) if origin is not None else "", placed)

    return python_source(emitted.graph, docstring_of(lines), remark, modules=emitted.modules)


def _place(node: fx.Node) -> str:
    """ "backward of model.layers.0.mlp, model.py:31: return self.down(x)"."""
    if node.op == "placeholder":
        return ""
    place, code = source_line(node)
    where = f"{'backward of ' if is_backward(node) else ''}{module_path(node) or 'the model'}"
    return f"{where}, {_shortened(place)}: {code}" if place else where


def _shortened(place: str) -> str:
    """A place without the way to the installed packages or to the present folder."""
    installed = place.rpartition("site-packages/")[2]
    return installed.removeprefix(f"{os.getcwd()}/")


def _wrapped(start: str, names: Sequence[str]) -> list[str]:
    return textwrap.wrap(start + "; ".join(names), 116, subsequent_indent="    ", break_long_words=False)


def _states(trace: Trace, plan: Plan) -> dict[str, State]:
    """The state in which the plan makes each value, by name."""
    states: dict[str, State] = {p.node: plan.decisions.params[p.fqn] for p in trace.params}
    for node in trace.graph_module.graph.nodes:
        decision = plan.decisions.nodes.get(node.name)
        for index, state in enumerate(decision.result_states if decision else ()):
            if state is not None:
                states[value_name(node, index)] = state
    return states
