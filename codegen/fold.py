"""An emitted graph as code that does not grow with depth: repeated stretches become loops.

Each stretch that repeats (`autopar.codegen.repeats`) is written once, as a block, and
called turn by turn. What differs between turns comes in lists, one entry a turn:
parameters and saved tensors straight from the caller, so that no line of code names them.
What one turn hands to the next is carried, what several need is shared, and what leaves a
turn for good (activations to save, gradients) is collected in lists again.

The order of ops is that of the flat graph, and a tensor dies where it died there: every
call takes its arguments in one list and empties it, and nobody else holds them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from autopar._torch_compat import boxed_codegen
from autopar.codegen.repeats import Loop, carried_position, find_loops, last_touches, token


def pack(*values: Any) -> list[Any]:
    """A list that its user empties."""
    return list(values)


def each(values: list[Any], op: Callable[..., Any], *args: Any) -> list[Any]:
    """`op` of every value; empties the list."""
    done = [op(value, *args) for value in values]
    values.clear()
    return done


class Repeated(nn.Module):
    """Calls a block once a turn.

    The block takes what is carried, then what comes once a turn, then what is shared; it returns what leaves it.
    carried / collected: which of the block's results the next turn takes, and which are kept of every turn.
    """

    def __init__(self, block: fx.GraphModule, turns: int, carried: Sequence[int], collected: Sequence[int]) -> None:
        super().__init__()
        self.block, self.turns, self.carried, self.collected = block, turns, tuple(carried), tuple(collected)

    def __call__(self, *args: Any) -> Any:
        """See `FoldedGraph`: no hooks."""
        return self.forward(*args)

    def forward(self, carried: list[Any], by_turn: list[list[Any]], given: list[list[Any]], shared: list[Any]) -> Any:
        """What the last turn hands on, then a list per collected result; empties its arguments.

        by_turn: per turn, its list. given: per input, a list with one entry a turn.
        """
        lists: list[list[Any]] = [[] for _ in self.collected]
        for turn in range(self.turns):
            arguments = [*carried, *by_turn[turn], *(values[turn] for values in given), *shared]
            carried.clear()
            by_turn[turn].clear()
            for values in given:
                values[turn] = None
            if turn == self.turns - 1:
                shared.clear()
            results = self.block.forward(arguments)
            for kept, index in zip(lists, self.collected, strict=True):
                kept.append(results[index])
            carried = [results[index] for index in self.carried]
            del results
        return [*carried, *lists]


@dataclass(frozen=True)
class FoldedGraph:
    """A graph module that takes and returns tensors and lists of them, called with flat lists.

    inputs: per argument of the module, the index of a flat input, or per turn the indices of its inputs.
    outputs: per flat output, where it is: (index of the module's result, turn or None).
    """

    module: fx.GraphModule
    inputs: tuple[int | tuple[tuple[int, ...], ...], ...]
    outputs: tuple[tuple[int, int | None], ...]

    def __call__(self, flat: list[Any]) -> list[Any]:
        """Run on the flat inputs; empties the list.

        Not as modules are called: these have no hooks, and torch's memory tracker knows only modules that run once a
        step, where a stage runs its passes once a micro-batch.
        """
        arguments: list[Any] = [
            flat[place] if isinstance(place, int) else [[flat[i] for i in turn] for turn in place]
            for place in self.inputs
        ]
        flat.clear()
        results = self.module.forward(arguments)
        return [results[at] if turn is None else results[at][turn] for at, turn in self.outputs]

    def code(self) -> str:
        """All code: the module's and its blocks', once each."""
        blocks = [f"# {name}\n{m.code}" for name, m in self.module.named_modules() if isinstance(m, fx.GraphModule)]
        return "\n".join(blocks)


def fold(graph: fx.Graph) -> FoldedGraph:
    """The same program with its repeated stretches as loops; `graph` stays as it is."""
    return _Folder(graph, find_loops(graph)).run()


class _Folder:
    """values: flat node -> node of the new graph. lists: flat node -> (collected list in the new graph, turn).

    touches: waits and reshapes of what is returned; they come last of all. touched: those done list by list.
    """

    def __init__(self, graph: fx.Graph, loops: list[Loop]) -> None:
        self.old, self.loops = graph, loops
        self.new, self.root = fx.Graph(), nn.Module()
        self.values: dict[fx.Node, fx.Node] = {}
        self.lists: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.inside = {node for loop in loops for turn in loop.turns for node in turn}
        self.results = list(graph.output_node().args[0])  # type: ignore[arg-type]
        self.plans = [_Plan(loop) for loop in loops]
        self.touches = last_touches(graph)
        self.touched: set[fx.Node] = set()
        self._kept: list[tuple[list[fx.Node], fx.Node]] = []

    def run(self) -> FoldedGraph:
        places = self._placeholders()
        starts = {loop.turns[0][0]: i for i, loop in enumerate(self.loops)}
        for node in self.old.nodes:
            if node in starts:
                self._call(starts[node])
            elif node.op == "call_function" and node not in self.inside and node not in self.touches:
                self.values[node] = self.new.node_copy(node, self._value)
        for made, holder in self._kept:
            self._finish(made, holder)
        for node in self.old.nodes:
            if node in self.touches and node not in self.touched:
                self.values[node] = self.new.node_copy(node, self._value)
        outputs = self._output()
        self.new.lint()
        self.new.set_codegen(boxed_codegen())
        return FoldedGraph(fx.GraphModule(self.root, self.new, class_name="Folded"), places, outputs)

    def _placeholders(self) -> tuple[int | tuple[tuple[int, ...], ...], ...]:
        """Those that something outside of loops takes, or several turns; the others come in lists."""
        old = self.old.find_nodes(op="placeholder")
        index = {node: i for i, node in enumerate(old)}
        alone = {n for plan in self.plans for row in (*plan.carried, *plan.given, *plan.shared) for n in row}
        places: list[int | tuple[tuple[int, ...], ...]] = []
        for node in old:
            outside = any(u not in self.inside for u in node.users)
            if node in alone or outside or not node.users:
                copy = self.new.placeholder(node.name)
                copy.target, copy.meta = copy.name, dict(node.meta)
                self.values[node] = copy
                places.append(index[node])
        for number, plan in enumerate(self.plans):
            plan.argument = self.new.placeholder(f"by_turn_{number}")
            plan.argument.target = plan.argument.name
            turns = range(len(plan.loop.turns))
            places.append(tuple(tuple(index[row[t]] for row in plan.by_turn) for t in turns))
        return tuple(places)

    def _value(self, node: fx.Node) -> fx.Node:
        """The node of the new graph that holds what `node` made."""
        if node not in self.values:
            made, turn = self.lists[node]
            self.values[node] = self.new.call_function(operator.getitem, (made, turn))
        return self.values[node]

    def _pack(self, nodes: Iterable[fx.Node]) -> fx.Node:
        return self.new.call_function(pack, tuple(self._value(n) for n in nodes))

    def _call(self, number: int) -> None:
        plan = self.plans[number]
        block = plan.block()
        name = f"layer_{number}"
        carried = [plan.loop.outputs.index(q) for q in plan.carried_at]
        collected = [plan.loop.outputs.index(q) for q in plan.collected]
        self.root.add_module(name, Repeated(block, len(plan.loop.turns), carried, collected))
        arguments = (
            self._pack(row[0] for row in plan.carried),
            plan.argument,
            [self._pack(row) for row in plan.given],
            self._pack(row[0] for row in plan.shared),
        )
        made = self.new.call_module(name, arguments)
        last = plan.loop.turns[-1]
        for i, q in enumerate(plan.carried_at):
            if q not in plan.collected and any(u not in self.inside for u in last[q].users):
                self.values[last[q]] = self.new.call_function(operator.getitem, (made, i))
        for i, q in enumerate(plan.collected, len(plan.carried_at)):
            kept = self.new.call_function(operator.getitem, (made, i))
            self._kept.append(([turn[q] for turn in plan.loop.turns], kept))
            self.lists.update({turn[q]: (kept, t) for t, turn in enumerate(plan.loop.turns)})

    def _finish(self, made: list[fx.Node], holder: fx.Node) -> None:
        """Where all that happens to a collected result are the same last touches: do them to the whole list."""
        self.lists.update({node: (holder, turn) for turn, node in enumerate(made)})
        users = [[u for u in node.users if u not in self.inside] for node in made]
        light = all(row and len(row) == len(users[0]) and self.touches.issuperset(row) for row in users)
        columns = [list(column) for column in zip(*users, strict=True)] if light else []
        if any(len({token(n) for n in column}) > 1 or len(set(column)) < len(made) for column in columns):
            return
        for column in columns:
            first = column[0]
            values = holder if column is columns[-1] else self.new.call_function(list, (holder,))
            done = self.new.call_function(each, (values, first.target, *first.args[1:]))
            self.touched.update(column)
            self._finish(column, done)

    def _output(self) -> tuple[tuple[int, int | None], ...]:
        """The new graph returns each list once, and what is in no list one by one."""
        entries: dict[fx.Node, int] = {}
        outputs: list[tuple[int, int | None]] = []
        arguments: list[Any] = []
        for node in self.results:
            holder, turn = self.lists[node] if node in self.lists else (self._value(node), None)
            if holder not in entries:
                entries[holder] = len(arguments)
                arguments.append(holder)
            outputs.append((entries[holder], turn))
        self.new.output(tuple(arguments))
        return tuple(outputs)


class _Plan:
    """How the inputs of a loop reach its turns, and which of its results are collected.

    carried: rows handed from turn to turn, as the positions `carried_at`. by_turn: rows of placeholders.
    given: other rows. shared: rows that are the same node in all turns.
    """

    argument: fx.Node

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.carried: list[tuple[fx.Node, ...]] = []
        self.by_turn: list[tuple[fx.Node, ...]] = []
        self.given: list[tuple[fx.Node, ...]] = []
        self.shared: list[tuple[fx.Node, ...]] = []
        for row in loop.inputs:
            if len(set(row)) == 1:
                self.shared.append(row)
            elif carried_position(row, loop.turns) is not None:
                self.carried.append(row)
            elif all(n.op == "placeholder" for n in row):
                self.by_turn.append(row)
            else:
                self.given.append(row)
        self.carried_at = [q for row in self.carried if (q := carried_position(row, loop.turns)) is not None]
        members = {node for turn in loop.turns for node in turn}
        self.collected = [q for q in loop.outputs if self._leaves(q, members)]

    def _leaves(self, position: int, members: set[fx.Node]) -> bool:
        """Whether a result of any turn (but the last, if it is carried) is used outside of the loop."""
        turns = self.loop.turns[:-1] if position in self.carried_at else self.loop.turns
        return any(u not in members for turn in turns for u in turn[position].users)

    def block(self) -> fx.GraphModule:
        """One turn as a graph module; it returns the results at `loop.outputs`."""
        graph = fx.Graph()
        inputs: dict[int, fx.Node] = {}
        order = {row: i for i, row in enumerate(self.loop.inputs)}
        for row in (*self.carried, *self.by_turn, *self.given, *self.shared):
            node = graph.placeholder(row[0].name)
            node.target, node.meta = node.name, dict(row[0].meta)
            inputs[order[row]] = node
        made: list[fx.Node] = []
        for node, slots in zip(self.loop.turns[0], self.loop.slots, strict=True):
            refs = iter(slots)

            def moved(_: fx.Node, refs: Any = refs) -> fx.Node:
                slot = next(refs)
                return made[slot] if slot >= 0 else inputs[-1 - slot]

            made.append(_copied(graph, node, moved))
        graph.output(tuple(made[q] for q in self.loop.outputs))
        graph.lint()
        graph.set_codegen(boxed_codegen())
        return fx.GraphModule(nn.Module(), graph, class_name="Layer")


def _copied(graph: fx.Graph, node: fx.Node, moved: Any) -> fx.Node:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), moved)
    copy = graph.create_node(node.op, node.target, args, kwargs, node.name)
    copy.meta = dict(node.meta)
    return copy
