"""Gathers the parameters of a stage once a step: what forward passes would make of parameters alone, by collectives.

For parameters that are stored in parts but held whole while they are used (ZeRO stages 1 and 2): a forward pass would
gather them for every micro-batch, and every micro-batch in flight would keep a copy for its backward pass.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from torch import fx

from autopar.codegen.builder import is_collective
from autopar.codegen.emit import Version
from autopar.codegen.stage_types import StagePass, StageProgram


def gather_once(stage: StageProgram, params: Container[str]) -> StageProgram:
    """The stage with a `gather` pass, whose results its other passes take. params: placeholders of the joint graph."""
    graph, axes = stage.forward.graph, len(stage.mesh)
    placeholders = graph.find_nodes(op="placeholder")
    taken = dict(zip(placeholders[axes:], stage.forward.inputs, strict=True))
    stored = {node for node, version in taken.items() if version[0] in params}
    whole = _made_of(graph, {*placeholders[:axes], *stored})
    ends = [n for n in graph.nodes if n in whole and any(user not in whole for user in n.users)]
    if not ends:
        return stage
    names = _names(stage, graph, ends)
    gather = _copied(graph, ends, placeholders[:axes], taken)
    inputs = _replaced(graph, ends, whole, names, taken)
    kept = _drop_saved(stage, graph, set(names.values()))
    return replace(
        stage,
        forward=StagePass(graph, inputs),
        saved_forward=kept,
        gather=gather,
        gathered=tuple(names[n] for n in ends),
    )


def _made_of(graph: fx.Graph, given: set[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on `given` alone, by way of a collective; with those on the way to it they are dropped."""
    alone, gathered = set(given), set()
    for node in graph.nodes:
        operands = node.all_input_nodes
        if node.op == "call_function" and operands and all(i in alone for i in operands):
            alone.add(node)
            if is_collective(node) or any(i in gathered for i in operands):
                gathered.add(node)
    return gathered


def _names(stage: StageProgram, graph: fx.Graph, ends: list[fx.Node]) -> dict[fx.Node, Version]:
    """What the passes call each result: as it was saved for the backward pass, else by the node's own name."""
    results = graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    saved = dict(zip(results[len(results) - len(stage.saved_forward) :], stage.saved_forward, strict=True))
    return {n: saved.get(n, (f"gathered {n.name}", ())) for n in ends}


def _copied(
    graph: fx.Graph, ends: list[fx.Node], coordinates: list[fx.Node], taken: dict[fx.Node, Version]
) -> StagePass:
    """A graph of its own that makes `ends`."""
    needed, queue = set(ends), list(ends)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                queue.append(node)
    made = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed or node in coordinates:
            env[node] = made.node_copy(node, env.__getitem__)
    made.output(tuple(env[n] for n in ends))
    made.lint()
    return StagePass(made, tuple(taken[n] for n in graph.nodes if n in needed and n in taken))


def _replaced(
    graph: fx.Graph,
    ends: list[fx.Node],
    whole: set[fx.Node],
    names: dict[fx.Node, Version],
    taken: dict[fx.Node, Version],
) -> tuple[Version, ...]:
    """Take `ends` as inputs; the inputs of the graph then."""
    last = graph.find_nodes(op="placeholder")[-1]
    for node in ends:
        with graph.inserting_after(last):
            last = graph.placeholder(f"taken_{node.name}")
        last.target = last.name
        last.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in whole)
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op == "call_function" and node in whole:
            graph.erase_node(node)
    graph.eliminate_dead_code()  # casts of what is gathered
    graph.lint()
    return (*taken.values(), *(names[n] for n in ends))


def _drop_saved(stage: StageProgram, graph: fx.Graph, gathered: set[Version]) -> tuple[Version, ...]:
    """Do not hand the backward pass what it can take from the gather; the versions still saved."""
    results = graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    first = len(results) - len(stage.saved_forward)
    kept = [(r, v) for r, v in zip(results[first:], stage.saved_forward, strict=True) if v not in gathered]
    graph.output_node().args = ((*results[:first], *(r for r, _ in kept)),)
    return tuple(v for _, v in kept)
