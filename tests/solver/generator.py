"""Problems to test the solver with: small random ones, and large ones shaped like a transformer's training step."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np

from autopar.solver import Choice, Op, Problem, Value


def random_problem(seed: int) -> Problem:
    """A small problem with everything in it, small enough for brute force. Times are multiples of 1/64 s."""
    return _RandomProblem(random.Random(seed)).build()


def with_capacity(problem: Problem, capacity_bytes: int | None) -> Problem:
    return replace(problem, capacity_bytes=capacity_bytes)


class _RandomProblem:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.ops: list[Op] = []
        self.values: list[Value] = []

    def build(self) -> Problem:
        rng = self.rng
        params = [self._add_op(f"param{i}", (), 1, always=True, persistent=True) for i in range(rng.randint(0, 2))]
        for i in range(rng.randint(2, 3)):
            self._add_op(f"f{i}", self._operands(len(self.values)), rng.choice((1, 1, 1, 2)))
        forward_ops = len(self.ops)
        backward = rng.randint(1, 3)
        for i in range(backward):
            self._add_op(f"b{i}", self._operands(len(self.values), favour_last=True), 1, live_out=rng.random() < 0.15)
        for param in params[:1]:
            if rng.random() < 0.8:
                self._add_gradient(param)
        for o in range(forward_ops):
            if self.ops[o].operands and rng.random() < 0.5:
                self.ops[o] = replace(self.ops[o], recompute_time=rng.randrange(forward_ops, len(self.ops)))
        return Problem(tuple(self.ops), tuple(self.values), forward_ops, constant_bytes=rng.choice((0, 5)))

    def _operands(self, made: int, favour_last: bool = False) -> tuple[int, ...]:
        if not made:
            return ()
        picked = [self.rng.randrange(made) for _ in range(self.rng.choice((1, 2, 2, 3)))]
        return tuple([made - 1, *picked[1:]] if favour_last else picked)

    def _add_value(self, name: str, always: bool, live_out: bool) -> int:
        n = self.rng.choice((1, 2, 2, 3))
        convert = np.array([[self.rng.randint(0, 64) / 64 for _ in range(n)] for _ in range(n)])
        np.fill_diagonal(convert, 0.0)
        if n > 1 and self.rng.random() < 0.2:
            convert[0, 1] = np.inf
        sizes = tuple(self.rng.randint(1, 40) for _ in range(n))
        workspace = np.array([[self.rng.choice((0, 0, 1, 3)) for _ in sizes] for _ in sizes])
        self.values.append(Value(name, sizes, convert, always, live_out, workspace))
        return len(self.values) - 1

    def _add_op(
        self, name: str, operands: tuple[int, ...], results: int, *, always=False, persistent=False, live_out=False
    ) -> int:
        made = tuple(self._add_value(f"{name}.{i}", always, live_out) for i in range(results))
        choices = tuple(self._choice(operands, made, persistent) for _ in range(self.rng.choice((1, 2, 2, 3))))
        self.ops.append(Op(name, operands, made, choices))
        return len(self.ops) - 1

    def _choice(self, operands: tuple[int, ...], made: tuple[int, ...], persistent: bool) -> Choice:
        rng = self.rng
        return Choice(
            rng.randint(0, 128) / 64,
            tuple(rng.randrange(len(self.values[v].state_bytes)) for v in operands),
            tuple(rng.randrange(len(self.values[v].state_bytes)) for v in made),
            workspace_bytes=rng.choice((0, 0, rng.randint(1, 20))),
            persistent_bytes=rng.randint(1, 20) if persistent else 0,
        )

    def _add_gradient(self, param: int) -> None:
        """The gradient of a parameter: the last value made, in the parameter's state."""
        source = len(self.values) - 1
        n = len(self.values[source].state_bytes)
        uses = [self.rng.randrange(n) for _ in self.ops[param].choices]
        self.values.append(replace(self.values[source], name=f"grad{param}", always_available=False, live_out=True))
        choices = tuple(Choice(0.0, (u,), (u,)) for u in uses)
        name = f"grad{param}"
        operands, results = (source,), (len(self.values) - 1,)
        self.ops.append(Op(name, operands, results, choices, tied_to=param, results_start_next=True))
        if self.rng.random() < 0.3:  # the same value once more: the conversion is shared
            self._add_op(f"after{param}", operands, 1)


def with_offload(problem: Problem, seed: int) -> Problem:
    """The same with most values free to wait on the host, some barred from waiting on the device, and other ways to
    store parameters that put memory on the host."""
    rng = random.Random(seed)
    values = []
    for value in problem.values:
        seconds = tuple(
            rng.choice((rng.randint(0, 48) / 64, np.inf if rng.random() < 0.2 else 0.5)) for _ in value.state_bytes
        )
        may_keep = rng.random() > 0.05
        fleeting = frozenset(i for i in range(len(value.state_bytes)) if rng.random() < 0.2)
        offload_s = seconds if rng.random() < 0.8 else None
        values.append(replace(value, offload_s=offload_s, may_keep=may_keep, fleeting=fleeting))
    ops = list(problem.ops)
    for o, op in enumerate(ops):
        if any(c.persistent_bytes for c in op.choices) and rng.random() < 0.7:
            choices = [_on_host(c, rng) if rng.random() < 0.5 else c for c in op.choices]
            ops[o] = replace(op, choices=tuple(choices))
    return replace(problem, ops=tuple(ops), values=tuple(values))


def _on_host(choice: Choice, rng: random.Random) -> Choice:
    moved = rng.randint(0, choice.persistent_bytes)
    return replace(
        choice,
        cost_s=choice.cost_s + rng.randint(0, 32) / 64,
        persistent_bytes=choice.persistent_bytes - moved,
        host_bytes=moved,
    )
