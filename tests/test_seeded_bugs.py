"""Bugs planted in emitted programs: verify catches every one and names the node where it sits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx

import autopar
from autopar.codegen.builder import GROUP_PREFIX, c10d, is_collective
from autopar.codegen.emit import EmittedProgram, emit
from autopar.codegen.overlap import overlap
from autopar.cost.model import CostModel
from autopar.dataflow import Dataflow
from autopar.errors import VerifyError
from autopar.plan_types import Decisions
from autopar.sample import sample_values
from autopar.trace import Trace, trace
from autopar.verification import match_collectives, verify_program
from tests.models import tiny_bert, tiny_llama, tiny_mlp

aten = torch.ops.aten
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_llama(layers=1),
    "bert": lambda: tiny_bert(layers=1),
    "mlp": tiny_mlp,
}
MESH = (2, 2)


@dataclass(frozen=True)
class Case:
    """A model under a plan that mixes data and tensor parallelism."""

    traced: Trace
    decisions: Decisions
    costs: CostModel
    values: dict[str, torch.Tensor]

    def program(self) -> EmittedProgram:
        """A fresh program: bugs are planted in place."""
        return emit(self.traced, self.decisions, MESH, self.costs, bucket_bytes=0)

    def node(self, name: str | None) -> fx.Node:
        """A node of the joint graph by name."""
        return next(n for n in self.traced.graph_module.graph.nodes if n.name == name)

    def caught(self, program: EmittedProgram, decisions: Decisions | None = None) -> str:
        """The node that verify names."""
        with pytest.raises(VerifyError) as error:
            verify_program(self.traced, decisions or self.decisions, program, self.values)
        assert error.value.node is not None, str(error.value)
        assert error.value.node in str(error.value)
        return error.value.node


@cache
def case(name: str) -> Case:
    model, call = MODELS[name]()
    cluster = autopar.ClusterSpec.preset("a100-80g", gpus=4)
    plan = autopar.plan(model, cluster, example_inputs=call, pin={"dp": 2, "tp": 2, "zero": 3}, time_limit_s=5)
    traced = trace(model, call)
    return Case(traced, plan.decisions, CostModel(cluster, MESH), sample_values(traced, model, call, 0))


def starts(graph: fx.Graph, *targets: object) -> list[fx.Node]:
    """The collectives of a graph, in order; of some kinds if given."""
    return [n for n in graph.nodes if is_collective(n) and (not targets or n.target in targets)]


def passes(program: EmittedProgram) -> tuple[fx.Graph, fx.Graph]:
    return program.forward, program.backward


def every(name: str, find: Callable[[fx.Graph], list[fx.Node]]) -> list[tuple[int, int]]:
    """(pass, position) of up to three nodes per pass that `find` finds: the first, the middle and the last."""
    found = []
    for which, graph in enumerate(passes(case(name).program())):
        count = len(find(graph))
        found += [(which, i) for i in sorted({0, count // 2, count - 1}) if 0 <= i < count]
    return found


each_model = pytest.mark.parametrize("name", list(MODELS))


@each_model
def test_the_program_without_bugs_is_right(name: str) -> None:
    it = case(name)
    report = verify_program(it.traced, it.decisions, it.program(), it.values)
    assert report.tolerance == 1e-9 and report.collectives > 5


@each_model
def test_dropped_all_reduce(name: str) -> None:
    """The summands of one rank are taken for the sum: the value that should have been reduced is named."""
    it = case(name)

    def find(graph: fx.Graph) -> list[fx.Node]:
        return [n for n in starts(graph, c10d.all_reduce.default) if n.args[1] == "sum"]

    places = every(name, find)
    assert places
    for which, position in places:
        program = it.program()
        start = find(passes(program)[which])[position]
        origin = str(start.meta["origin"])
        (wait,) = start.users
        wait.replace_all_uses_with(start.all_input_nodes[0])
        passes(program)[which].erase_node(wait)
        passes(program)[which].erase_node(start)
        named = it.caught(program)
        users = {u.name for u in reached(it.node(origin))}
        assert named == origin or named in users, (origin, named)


def reached(node: fx.Node, depth: int = 4) -> set[fx.Node]:
    """Nodes that use a node directly or through a few others (views)."""
    return set(node.users) | {n for u in node.users for n in reached(u, depth - 1)} if depth else set()


@each_model
def test_wrong_scale(name: str) -> None:
    """A product comes out 1 % too large: exactly this node is named."""
    it = case(name)

    def find(graph: fx.Graph) -> list[fx.Node]:
        products = (aten.mm.default, aten.addmm.default, aten.bmm.default)
        return [n for n in graph.nodes if n.target in products and "version" in n.meta]

    for which, position in every(name, find):
        program = it.program()
        graph = passes(program)[which]
        product = find(graph)[position]
        with graph.inserting_after(product):
            scaled = graph.call_function(aten.mul.Scalar, (product, 1.01))
        product.replace_all_uses_with(scaled, delete_user_cb=lambda user, own=scaled: user is not own)
        scaled.meta = dict(product.meta)
        expected = product.meta.pop("version")[0]
        assert it.caught(program) == expected


@each_model
def test_missing_redistribution(name: str) -> None:
    """Every rank takes the first part of a tensor instead of its own: the sliced value is named."""
    it = case(name)

    def find(graph: fx.Graph) -> list[fx.Node]:
        return [n for n in graph.nodes if n.target is aten.slice.Tensor and isinstance(n.args[2], fx.Node)]

    places = every(name, find)
    assert places
    for which, position in places:
        program = it.program()
        part = find(passes(program)[which])[position]
        size = part.meta["val"].shape[int(part.args[1])]  # type: ignore[arg-type]
        part.args = (*part.args[:2], 0, size)
        origin = str(part.meta["origin"])
        whole = it.values.get(origin)
        if whole is not None and same_parts(whole, int(part.args[1]), size):  # type: ignore[arg-type]
            continue
        assert it.caught(program) in {origin} | {u.name for u in reached(it.node(origin))}


def same_parts(whole: torch.Tensor, dim: int, size: int) -> bool:
    """Whether the parts of a tensor are alike (a mask of ones): taking the wrong one is no bug then."""
    parts = whole.split(size, dim)
    return all(torch.equal(p, parts[0]) for p in parts)


@each_model
def test_redistribution_left_out_altogether(name: str) -> None:
    """A gathered operand is used uncut or ungathered, so that shapes no longer fit: an error with a node, no crash."""
    it = case(name)
    program = it.program()
    start = starts(program.forward, c10d.all_gather_into_tensor.default)[0]
    (wait,) = start.users
    wait.replace_all_uses_with(start.all_input_nodes[0])
    program.forward.erase_node(wait)
    program.forward.erase_node(start)
    named = it.caught(program)
    origin = str(start.meta["origin"])
    assert named == origin or named in {u.name for u in reached(it.node(origin))}


@each_model
def test_wrong_state_in_a_decision(name: str) -> None:
    """The plan says that summands are the sum (P taken for R): the op whose result it is is named."""
    it = case(name)
    flow = Dataflow(it.traced.graph_module.graph)
    summands_taken = {
        use.operand.value
        for uses in flow.uses.values()
        for use in uses
        if "P" in it.decisions.nodes[use.user.name].operand_states[use.slot]
    }
    partial = [
        n
        for n, d in it.decisions.nodes.items()
        if d.result_states[0] and "P" in d.result_states[0] and n not in summands_taken
    ]
    assert partial
    for wrong in (partial[0], partial[len(partial) // 2], partial[-1]):
        decision = it.decisions.nodes[wrong]
        states = tuple(s and tuple("R" if p == "P" else p for p in s) for s in decision.result_states)
        nodes = {**it.decisions.nodes, wrong: replace(decision, result_states=states)}
        decisions = replace(it.decisions, nodes=nodes)
        program = emit(it.traced, decisions, MESH, it.costs)
        assert it.caught(program, decisions) == wrong


@pytest.mark.parametrize("name", ["llama", "bert"])  # neighbours in the MLP depend on each other
def test_swapped_order_on_one_rank(name: str) -> None:
    """One rank starts two different collectives of one group in the other order."""
    good, swapped, origins = swapped_programs(case(name), same_group=True)
    assert match_collectives([good] * 4, MESH) > 0
    for rank in range(4):
        with pytest.raises(VerifyError, match=r"collectives don't match: rank \d issues") as error:
            match_collectives([swapped if r == rank else good for r in range(4)], MESH)
        assert error.value.node in origins


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_ranks_that_wait_for_each_other(name: str) -> None:
    """Two of four ranks start collectives of two groups in the other order: a ring of waiting ranks."""
    good, swapped, origins = swapped_programs(case(name), same_group=False)
    with pytest.raises(VerifyError, match=r"deadlock: rank \d waits") as error:
        match_collectives([good, swapped, swapped, good], MESH)
    assert error.value.node in origins


def swapped_programs(it: Case, *, same_group: bool) -> tuple[EmittedProgram, EmittedProgram, tuple[str, str]]:
    """The program, the program with two collectives swapped, and where these come from."""
    good, swapped = it.program(), it.program()
    for program in (good, swapped):
        overlap(program.forward)
        overlap(program.backward)
    origins = swap_two(swapped.backward, same_group=same_group) or swap_two(swapped.forward, same_group=same_group)
    assert origins is not None
    return good, swapped, origins


def swap_two(graph: fx.Graph, *, same_group: bool) -> tuple[str, str] | None:
    """Swap the first two neighbouring, different, independent collectives; returns where they come from."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    found = starts(graph)
    for first, second in itertools.pairwise(found):
        groups = [next(a for a in n.args if str(a).startswith(GROUP_PREFIX)) for n in (first, second)]
        differ = (first.target, shapes(first)) != (second.target, shapes(second)) or groups[0] != groups[1]
        wanted = differ and (groups[0] == groups[1]) == same_group
        if wanted and all(order[u] > order[second] for u in first.users):
            second.append(first)
            graph.lint()
            return str(first.meta["origin"]), str(second.meta["origin"])
    return None


def shapes(node: fx.Node) -> list[torch.Size]:
    return [i.meta["val"].shape for i in node.all_input_nodes]


@each_model
def test_dropped_wait(name: str) -> None:
    """Values would be right here and wrong on a real network: it is the structure that is refused."""
    it = case(name)
    program = it.program()
    start = starts(program.forward)[0]
    (wait,) = start.users
    wait.replace_all_uses_with(start)
    program.forward.erase_node(wait)
    with pytest.raises(VerifyError, match="before it is waited for"):
        match_collectives([program] * 4, MESH)
