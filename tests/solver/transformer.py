"""A training step of a decoder-only transformer as a planning problem, on a mesh of one or two axes.

Placements per axis and op are the usual ones (replicated, batch, sequence, column, row,
partial); conversions cost what collectives cost by an alpha-beta model, and along shortest
paths. Numbers are those of a small cluster: the shape of the problem is the point.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np

from autopar.solver import Choice, Op, Problem, Value

LATENCY_S = 10e-6
BYTES_PER_S = (50e9, 300e9)  # per mesh axis
FLOPS_PER_S = 300e12
HBM_BYTES_PER_S = 2e12
LAUNCH_S = 5e-6

Rule = tuple[tuple[str, ...], str]  # placements of operands, and of the result

LINEAR: list[Rule] = [  # x [B, S, I], w [O, I] -> y [B, S, O]
    (("R", "R"), "R"), (("0", "R"), "0"), (("1", "R"), "1"), (("R", "0"), "2"), (("2", "1"), "P"), (("P", "R"), "P"),
]  # fmt: skip
LINEAR_DX: list[Rule] = [  # dy [B, S, O], w [O, I] -> dx [B, S, I]
    (("R", "R"), "R"), (("0", "R"), "0"), (("1", "R"), "1"), (("2", "0"), "P"), (("R", "1"), "2"), (("P", "R"), "P"),
]  # fmt: skip
LINEAR_DW: list[Rule] = [  # dy [B, S, O], x [B, S, I] -> dw [O, I]
    (("R", "R"), "R"), (("0", "0"), "P"), (("1", "1"), "P"), (("2", "R"), "0"), (("R", "2"), "1"), (("P", "R"), "P"),
]  # fmt: skip


def elementwise(operands: int, *, linear: bool = False, dims: str = "012") -> list[Rule]:
    rules: list[Rule] = [(("R",) * operands, "R")]
    rules += [((d,) * operands, d) for d in dims]
    return [*rules, (("P",) * operands, "P")] if linear else rules


@dataclass
class Tensor:
    value: int
    shape: tuple[int, ...]
    placements: str


class TransformerProblem:
    """Builds the problem op by op; `build` is the way in."""

    def __init__(self, mesh: tuple[int, ...]) -> None:
        self.mesh = mesh
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self.states: dict[str, list[tuple[str, ...]]] = {}
        self.params: dict[int, int] = {}  # value -> op

    @staticmethod
    def build(
        layers: int = 4, mesh: tuple[int, ...] = (4, 8), batch: int = 32, seq: int = 2048, width: int = 4096
    ) -> Problem:
        return TransformerProblem(mesh)._build(layers, batch, seq, width)

    # -- values and ops ----------------------------------------------------------

    def _value(self, name: str, shape: tuple[int, ...], *, always=False, live_out=False) -> Tensor:
        placements = "R" + "".join(map(str, range(len(shape)))) + "P"
        states = self.states.setdefault(placements, list(itertools.product(placements, repeat=len(self.mesh))))
        sizes = [self._bytes(shape, s) for s in states]
        cost = self._conversions(states, sizes)
        self.values.append(Value(name, tuple(int(b) for b in sizes), cost, always, live_out))
        return Tensor(len(self.values) - 1, shape, placements)

    def _bytes(self, shape: tuple[int, ...], state: tuple[str, ...]) -> float:
        cut = math.prod(n for p, n in zip(state, self.mesh, strict=True) if p.isdigit())
        return 2 * math.prod(shape) / cut

    def _conversions(self, states: list[tuple[str, ...]], sizes: list[float]) -> np.ndarray:
        n = len(states)
        cost = np.full((n, n), np.inf)
        np.fill_diagonal(cost, 0.0)
        for i, j in itertools.permutations(range(n), 2):
            changed = [a for a in range(len(self.mesh)) if states[i][a] != states[j][a]]
            if len(changed) == 1:
                a = changed[0]
                cost[i, j] = self._move(states[i][a], states[j][a], sizes[i], self.mesh[a], BYTES_PER_S[a])
        for k in range(n):
            cost = np.minimum(cost, cost[:, k : k + 1] + cost[k : k + 1, :])
        return cost

    def _move(self, source: str, target: str, nbytes: float, ranks: int, bytes_per_s: float) -> float:
        share = (ranks - 1) / ranks
        if source == "R":
            return nbytes / HBM_BYTES_PER_S / ranks + LAUNCH_S
        if source == "P":
            return LATENCY_S + share * nbytes * (2 if target == "R" else 1) / bytes_per_s
        if target == "P":
            return np.inf
        return LATENCY_S + (share * nbytes * ranks if target == "R" else share * nbytes / ranks) / bytes_per_s

    def _add(
        self, name: str, operands: list[Tensor], rules: list[Rule], shape: tuple[int, ...], flops: float, live_out=False
    ) -> Tensor:
        result = self._value(name, shape, live_out=live_out)
        choices: dict[tuple[tuple[int, ...], int], Choice] = {}
        for picked in itertools.product(rules, repeat=len(self.mesh)):
            uses = tuple(
                self.states[t.placements].index(tuple(r[0][i] for r in picked)) for i, t in enumerate(operands)
            )
            makes = self.states[result.placements].index(tuple(r[1] for r in picked))
            share = math.prod(
                1 / n for r, n in zip(picked, self.mesh, strict=True) if any(p.isdigit() for p in (*r[0], r[1]))
            )
            moved = sum(self.values[t.value].state_bytes[u] for t, u in zip(operands, uses, strict=True))
            moved += self.values[result.value].state_bytes[makes]
            seconds = LAUNCH_S + max(flops * share / FLOPS_PER_S, moved / HBM_BYTES_PER_S)
            choices.setdefault((uses, makes), Choice(seconds, uses, (makes,)))
        self.ops.append(Op(name, tuple(t.value for t in operands), (result.value,), tuple(choices.values())))
        return result

    def _param(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._value(name, shape, always=True)
        size = self.values[tensor.value].state_bytes
        stored = [i for i, s in enumerate(self.states[tensor.placements]) if "P" not in s]
        choices = [Choice(20 * size[i] / HBM_BYTES_PER_S, (), (i,), persistent_bytes=7 * size[i]) for i in stored]
        self.params[tensor.value] = len(self.ops)
        self.ops.append(Op(name, (), (tensor.value,), tuple(choices)))
        return tensor

    def _gradient(self, param: Tensor, made: Tensor) -> None:
        tied_to = self.params[param.value]
        result = self._value(f"grad{tied_to}", param.shape, live_out=True)
        choices = tuple(Choice(0.0, (c.makes[0],), c.makes) for c in self.ops[tied_to].choices)
        name = f"grad{tied_to}"
        self.ops.append(Op(name, (made.value,), (result.value,), choices, tied_to=tied_to, results_start_next=True))

    # -- the model ---------------------------------------------------------------

    def _build(self, layers: int, batch: int, seq: int, width: int) -> Problem:
        hidden = (batch, seq, width)
        weights = []
        for i in range(layers):
            wide = 4 * width
            shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
            shapes |= {"gate": (wide, width), "up": (wide, width), "down": (width, wide)}
            weights.append({name: self._param(f"{i}.{name}", shape) for name, shape in shapes.items()})
        h = self._value("input", hidden, always=True)
        state = self.states[h.placements].index(("R",) * len(self.mesh))
        self.ops.append(Op("input", (), (h.value,), (Choice(0.0, (), (state,)),)))
        saved = []
        spans = []
        for i in range(layers):
            first = len(self.ops)
            h, kept = self._forward(f"{i}.", h, weights[i])
            spans.append((first, len(self.ops)))
            saved.append(kept)
        forward_ops = len(self.ops)
        grad = self._add("loss", [h], elementwise(1), h.shape, 0.0)
        again: dict[int, int] = {}
        for i in reversed(range(layers)):
            again |= dict.fromkeys(range(*spans[i]), len(self.ops))
            grad = self._backward(f"{i}.", grad, saved[i], weights[i])
        ops = tuple(replace(op, recompute_time=again.get(o)) for o, op in enumerate(self.ops))
        return Problem(ops, tuple(self.values), forward_ops)

    def _linear(self, name: str, x: Tensor, w: Tensor) -> Tensor:
        shape = (*x.shape[:2], w.shape[0])
        return self._add(name, [x, w], LINEAR, shape, 2 * math.prod(shape) * w.shape[1])

    def _linear_back(self, name: str, dy: Tensor, x: Tensor, w: Tensor) -> Tensor:
        flops = 2 * math.prod(dy.shape) * w.shape[1]
        dx = self._add(f"{name}.dx", [dy, w], LINEAR_DX, x.shape, flops)
        self._gradient(w, self._add(f"{name}.dw", [dy, x], LINEAR_DW, w.shape, flops))
        return dx

    def _forward(self, name: str, h: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        s = {"h0": h, "n0": self._add(name + "norm0", [h], elementwise(1, dims="01"), h.shape, 0.0)}
        for head in "qkv":
            s[head] = self._linear(name + head, s["n0"], w[head])
        flops = 4 * math.prod(h.shape) * h.shape[1]
        s["attn"] = self._add(name + "attn", [s["q"], s["k"], s["v"]], elementwise(3, dims="02"), h.shape, flops)
        s["o"] = self._linear(name + "o", s["attn"], w["o"])
        s["h1"] = self._add(name + "add0", [h, s["o"]], elementwise(2, linear=True), h.shape, 0.0)
        s["n1"] = self._add(name + "norm1", [s["h1"]], elementwise(1, dims="01"), h.shape, 0.0)
        s["gate"] = self._linear(name + "gate", s["n1"], w["gate"])
        s["up"] = self._linear(name + "up", s["n1"], w["up"])
        s["act"] = self._add(name + "silu", [s["gate"]], elementwise(1), s["gate"].shape, 0.0)
        s["mul"] = self._add(name + "mul", [s["act"], s["up"]], elementwise(2), s["gate"].shape, 0.0)
        s["down"] = self._linear(name + "down", s["mul"], w["down"])
        return self._add(name + "add1", [s["h1"], s["down"]], elementwise(2, linear=True), h.shape, 0.0), s

    def _backward(self, name: str, dy: Tensor, s: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        wide = s["gate"].shape
        dmul = self._linear_back(name + "down", dy, s["mul"], w["down"])
        dact = self._add(name + "dact", [dmul, s["up"]], elementwise(2), wide, 0.0)
        dup = self._add(name + "dup", [dmul, s["act"]], elementwise(2), wide, 0.0)
        dgate = self._add(name + "dgate", [dact, s["gate"]], elementwise(2), wide, 0.0)
        parts = [self._linear_back(name + "up", dup, s["n1"], w["up"])]
        parts.append(self._linear_back(name + "gate", dgate, s["n1"], w["gate"]))
        dn1 = self._add(name + "dn1", parts, elementwise(2, linear=True), dy.shape, 0.0)
        dh1 = self._add(name + "dnorm1", [dn1, s["h1"]], elementwise(2, dims="01"), dy.shape, 0.0)
        dh1 = self._add(name + "dadd0", [dh1, dy], elementwise(2, linear=True), dy.shape, 0.0)
        dattn = self._linear_back(name + "o", dh1, s["attn"], w["o"])
        flops = 4 * math.prod(dy.shape) * dy.shape[1]
        grads = []
        for head in "qkv":
            operands = [dattn, s["q"], s["k"], s["v"]]
            d = self._add(f"{name}d{head}", operands, elementwise(4, dims="02"), dy.shape, flops)
            grads.append(self._linear_back(name + head, d, s["n0"], w[head]))
        dn0 = self._add(name + "dn0", grads, elementwise(3, linear=True), dy.shape, 0.0)
        dh0 = self._add(name + "dnorm0", [dn0, s["h0"]], elementwise(2, dims="01"), dy.shape, 0.0)
        return self._add(name + "dadd1", [dh0, dh1], elementwise(2, linear=True), dy.shape, 0.0)
