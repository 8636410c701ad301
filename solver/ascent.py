"""A lower bound on any solution at given prices of memory, fast: dual ascent instead of an LP.

At a price on every byte at every time, the memory limit is one number (what the limit gives
back), and the problem is a graph: ops are nodes with *labels* (a choice, and whether the op
runs again), and every value is a factor that ties the op that makes it to the ops that use
it. What a factor costs (conversions, each shared by the uses that want the same state; keeping,
copying or making again for the backward pass) is found exactly, by dynamic programming over
sets of uses. Messages between ops and factors shift cost from one to the other without
changing the sum; the sum of all minima is a bound on every solution, whatever the messages
are. Sequential message passing raises it (Kolmogorov, "A new look at reweighted message
passing", 2015, section 4), sweep by sweep, to about the bound of the LP relaxation.

Along with the bound come *margins*: how much dearer than the bound any solution is that takes
a certain choice of a certain op. Choices with a margin beyond what an incumbent leaves open
can be left out of the integer program.

All costs are in model units: `cost_scale` per second.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from autopar.solver.factors import IMPOSSIBLE, Factor, factors_of
from autopar.solver.lifetimes import Kinds, Span, ValueLife, roots
from autopar.solver.linear import Floats, Ints
from autopar.solver.problem import Op, Problem

CONVERGED = 3e-5  # of the bound: a sweep that gains less is the last


@dataclass
class Held:
    """Bytes that labels hold over the same spans: nbytes [labels], the spans of all twins as arrays."""

    nbytes: Floats
    first: list[int]
    last: list[int]

    def cost(self, paid: Floats) -> Floats:
        first, last = (np.asarray(times, dtype=np.int64) for times in (self.first, self.last))
        spans = paid[last + 1] - paid[first]
        return self.nbytes * float(spans.sum())


@dataclass
class Node:
    """An op and all ops that take the same choice, with labels (choice, runs again).

    choice, again: [labels]. seconds, cost: [labels] of their own; cost counts memory at the present prices.
    held: what they hold, by role. links: (factor, position in it, domain index of every label).
    """

    choice: Ints
    again: npt.NDArray[np.bool_]
    seconds: Floats
    cost: Floats
    held: dict[object, Held] = field(default_factory=dict)
    links: list[tuple[int, int, Ints]] = field(default_factory=list)


@dataclass(frozen=True)
class Ascent:
    """bound: model units, the price that the limit gives back already taken off. margins: per op of the
    problem and choice; ops that share their choice share the array."""

    bound: float
    margins: list[Floats]


class DualAscent:
    """The graph of a problem, stated once and run at any prices."""

    def __init__(self, problem: Problem, lives: tuple[ValueLife, ...], kinds: Kinds | None = None) -> None:
        self.problem = problem
        self.root = roots(problem)
        self.nodes: dict[int, Node] = {}
        self._arrays: dict[int, _ChoiceArrays] = {}
        self._roles: dict[tuple[object, ...], tuple[Floats, list[tuple[tuple[str, int], Held]]]] = {}
        for o, op in enumerate(problem.ops):
            self._add_op(o, op, lives)
        self.factors = factors_of(problem, lives, self.root, kinds)
        for f, factor in enumerate(self.factors):
            self._link(f, factor)
        self.order = sorted(self.nodes)
        self.paid = np.zeros(len(problem.ops) + 1)

    # -- stating -----------------------------------------------------------------

    def _add_op(self, o: int, op: Op, lives: tuple[ValueLife, ...]) -> None:
        root = int(self.root[o])
        if root == o:
            index = np.arange(len(op.choices))
            modes = [False] if op.recompute_time is None else [True] if op.must_rerun else [False, True]
            again = np.repeat(np.array(modes), len(index))
            self.nodes[o] = Node(np.tile(index, len(modes)), again, np.zeros(len(again)), np.zeros(len(again)))
        node, values = self.nodes[root], self.problem.values
        key = (root, id(op.choices), op.recompute_time is None, *(id(values[v].state_bytes) for v in op.results))
        if key not in self._roles:  # identical layers share all of these
            self._roles[key] = self._roles_of(node, op)
        seconds, roles = self._roles[key]
        node.seconds += seconds
        for (name, result), held in roles:
            if name == "persistent":
                span: Span | None = (0, len(self.problem.ops) - 1)
            elif name == "workspace":
                span = (o, o)
            elif name == "workspace again":
                span = None if op.recompute_time is None else (op.recompute_time,) * 2
            else:
                life = lives[op.results[result]]
                span = life.base if name == "base" else life.rerun
            if span is not None:
                held.first.append(span[0])
                held.last.append(span[1])

    def _roles_of(self, node: Node, op: Op) -> tuple[Floats, list[tuple[tuple[str, int], Held]]]:
        """Per label, the seconds of an op and the bytes it holds, by role: a name, and which result."""
        found = self._arrays_of(op)
        roles = {("persistent", 0): found.persistent, ("workspace", 0): found.workspace}
        makes = list(zip(op.results, found.makes, strict=True))
        roles |= {("base", r): self._bytes(v)[states] for r, (v, states) in enumerate(makes)}
        if op.recompute_time is not None:
            roles[("workspace again", 0)] = found.workspace
            roles |= {("rerun", r): self._bytes(v)[states] for r, (v, states) in enumerate(makes)}
        held: list[tuple[tuple[str, int], Held]] = []
        for role, nbytes in roles.items():
            if nbytes.any():
                of_labels = nbytes[node.choice]
                if role[0] in ("workspace again", "rerun"):
                    of_labels = np.where(node.again, of_labels, 0.0)
                held.append((role, node.held.setdefault((role, nbytes.tobytes()), Held(of_labels, [], []))))
        return found.cost_s[node.choice] * np.where(node.again, 2.0, 1.0), held

    def _bytes(self, v: int) -> Floats:
        return np.asarray(self.problem.values[v].state_bytes, dtype=np.float64)

    def _arrays_of(self, op: Op) -> _ChoiceArrays:
        key = id(op.choices)  # identical layers share the very tuple
        if key not in self._arrays:
            self._arrays[key] = _ChoiceArrays(op)
        return self._arrays[key]

    def _link(self, f: int, factor: Factor) -> None:
        maker = self.problem.ops[factor.made_by]
        node = self.nodes[int(self.root[factor.made_by])]
        made = self._arrays_of(maker).makes[factor.result][node.choice]
        node.links.append((f, -1, factor.maker_index(made, node.again)))
        for position, use in enumerate(factor.uses):
            node = self.nodes[int(self.root[use.op])]
            wanted = self._arrays_of(self.problem.ops[use.op]).uses[use.slot][node.choice]
            node.links.append((f, position, factor.use_index(position, wanted, node.again)))
        factor.possible = [self._possible(f, i) for i in range(-1, len(factor.uses))]

    def _possible(self, f: int, position: int) -> npt.NDArray[np.bool_]:
        factor = self.factors[f]
        op = factor.made_by if position < 0 else factor.uses[position].op
        possible = np.zeros(factor.domain(position), dtype=bool)
        for g, i, index in self.nodes[int(self.root[op])].links:
            if g == f and i == position:
                possible[index] = True
        return possible

    # -- ascending ---------------------------------------------------------------

    def run(
        self, cost_scale: float, paid: Floats, sweeps: int, *, limit_bytes: int | None, enough: float = np.inf
    ) -> Ascent:
        """Sweep until the bound stands still, or `sweeps` times, or until it reaches `enough` (model units).

        paid: [times + 1] price of one byte from time 0 up to, not including, t (zeros: memory is free).
        limit_bytes: how many there are; None where they are free.
        """
        assert limit_bytes is not None or not paid[-1]
        self.paid = paid
        for node in self.nodes.values():
            node.cost = cost_scale * node.seconds + sum(held.cost(paid) for held in node.held.values())
        for factor in self.factors:
            factor.set_prices(cost_scale, paid)
        credit = float(paid[-1]) * ((limit_bytes or 0) - self.problem.constant_bytes)
        best = before = now = self.bound()
        margins: dict[int, Floats] = {}
        for turn in range(sweeps):
            before = now
            margins = self._sweep(forward=turn % 2 == 0)
            now = self.bound()
            best = max(best, now)
            if best - credit >= enough or (turn > 1 and now - before < CONVERGED * abs(best)):
                break
        return Ascent(best - credit, self._by_op(margins, best - before))

    def _by_op(self, margins: dict[int, Floats], slack: float) -> list[Floats]:
        """Margins per choice; they are counted from the bound before the last sweep, `slack` lower."""
        found = {}
        for root, node in self.nodes.items():
            least = np.full(len(self.problem.ops[root].choices), IMPOSSIBLE)
            np.minimum.at(least, node.choice, margins[root])
            found[root] = np.maximum(least - slack, 0.0)
        return [found[r] for r in self.root.tolist()]

    def bound(self) -> float:
        """The sum of all minima: no solution costs less (limit's price not taken off)."""
        total = sum(factor.least() for factor in self.factors)
        for node in self.nodes.values():
            rest = node.cost.copy()
            for f, position, index in node.links:
                rest -= self.factors[f].message(position)[index]
            total += float(rest.min())
        return total

    def _sweep(self, *, forward: bool) -> dict[int, Floats]:
        """Pass messages along the order of ops, or against it; the margins of all labels."""
        margins = {}
        for o in self.order if forward else reversed(self.order):
            node = self.nodes[o]
            whole, collected = self._collect(node)
            onward = [self._leads_on(f, o, forward) for f, _, _ in node.links]
            back = [self._leads_on(f, o, not forward) for f, _, _ in node.links]
            weight = 1.0 / max(sum(onward), sum(back), 1)
            margins[o] = whole - whole.min()
            for (f, position, index), marginal, leads in zip(node.links, collected, onward, strict=True):
                if leads:
                    least = np.full(len(marginal), IMPOSSIBLE)
                    np.minimum.at(least, index, whole)
                    message = np.full(len(marginal), IMPOSSIBLE)
                    message[index] = weight * least[index] - marginal[index]
                    self.factors[f].send(position, message)
        return margins

    def _collect(self, node: Node) -> tuple[Floats, list[Floats]]:
        """Shift what the factors of a node cost to its labels, one after the other (a factor may be linked twice);
        the cost of the labels then, and what each link gave."""
        whole, collected = node.cost.copy(), []
        for f, position, index in node.links:
            marginal = self.factors[f].marginal(position)
            whole += marginal[index]
            message = np.full(len(marginal), IMPOSSIBLE)
            message[index] = -marginal[index]
            self.factors[f].send(position, message)
            collected.append(marginal)
        return whole, collected

    def _leads_on(self, f: int, o: int, forward: bool) -> bool:
        first, last = self.factors[f].ends
        return last > o if forward else first < o


class _ChoiceArrays:
    """The choices of an op as arrays."""

    def __init__(self, op: Op) -> None:
        self.cost_s = np.array([c.cost_s for c in op.choices])
        self.persistent = np.array([float(c.persistent_bytes) for c in op.choices])
        self.workspace = np.array([float(c.workspace_bytes) for c in op.choices])
        self.uses = np.array([c.uses for c in op.choices], dtype=np.int64).reshape(len(op.choices), -1).T
        self.makes = np.array([c.makes for c in op.choices], dtype=np.int64).reshape(len(op.choices), -1).T
