"""1D, 2D, 2.5D and 3D products of a stack of MLP layers: as textbooks lay them out, and what theory says of them.

In a product Y = X W three dims may be cut: the rows M of X and Y, the columns N of W and Y, and K, over which is
summed. A scheme says for each of the two products of a layer which of them every mesh axis cuts. That
X travels along the axes that cut N, W along those that cut M, and sums along those that cut K, and how, the planner
finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import fx, nn

from autopar import ClusterSpec
from autopar.codegen.emit import emit
from autopar.codegen.memory import simulate_memory
from autopar.codegen.traffic import emitted_traffic
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec
from autopar.dataflow import is_backward, module_path, result_metas
from autopar.placements import PARTIAL, REPLICATE, State, shard
from autopar.plan_types import Decisions
from autopar.pricing import price
from autopar.rules import operands
from autopar.sharding import OpOption, Pins, build_problem
from autopar.solver import solve
from autopar.trace import ParamInfo, Trace, trace
from autopar.traffic import planned_traffic

ITEM_BYTES = 4  # float32
GAP = 1e-4  # to which plans are solved


@dataclass(frozen=True)
class Sizes:
    """Of a stack: rows, width and inner width, which must differ."""

    rows: int
    width: int
    inner: int


@dataclass(frozen=True)
class Scheme:
    """up, down: per mesh axis the dim that it cuts in the first and in the second product of a layer."""

    name: str
    mesh: tuple[int, ...]
    up: str
    down: str


def schemes(ranks: int) -> list[Scheme]:
    """The textbook schemes for a number of ranks that is a power of two; those whose shape it has."""
    bits = ranks.bit_length() - 1
    a, b = 1 << bits // 2, 1 << (bits - bits // 2)
    found = [Scheme("1D", (ranks,), "N", "K"), Scheme("2D", (a, b), "MN", "MN")]
    for q in (2, 4, 8):  # q x q ranks, as often as there are; as often as q is 3D's own shape
        if 1 < ranks // (q * q) <= q and ranks % (q * q) == 0:
            found.append(Scheme("2.5D", (ranks // (q * q), q, q), "MMN", "MMN"))
    if bits % 3 == 0:
        q = 1 << bits // 3
        found.append(Scheme("3D", (q, q, q), "MNK", "MKN"))
    return found


def layer_theory(scheme: Scheme, sizes: Sizes) -> Fraction:
    """Bytes that a rank sends in one layer, forward and backward.

    A tensor of a product that lacks the dims of some axes travels twice along these, in blocks that the other axes cut:
    X and W are gathered, and their gradients are summed to where they came from; Y is summed to where it goes, and its
    gradient is gathered.
    """
    total = Fraction(0)
    for cuts, n, k in ((scheme.up, sizes.inner, sizes.width), (scheme.down, sizes.width, sizes.inner)):
        for dims, numbers in (("MK", sizes.rows * k), ("KN", k * n), ("MN", sizes.rows * n)):
            cut = math.prod(s for s, c in zip(scheme.mesh, cuts, strict=True) if c in dims)
            uncut = math.prod(scheme.mesh) // cut
            total += 2 * Fraction(numbers * ITEM_BYTES, cut) * (1 - Fraction(1, uncut))
    return total


class Layer(nn.Module):
    """Two products."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.width, sizes.inner, bias=False)
        self.down = nn.Linear(sizes.inner, sizes.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, width]."""
        made: torch.Tensor = self.down(nn.functional.relu(self.up(x)))
        return made


class Stack(nn.Module):
    """Layers, then the mean square."""

    def __init__(self, sizes: Sizes, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows, width]."""
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def stack_trace(sizes: Sizes, layers: int) -> Trace:
    """The joint graph, without weights."""
    with torch.device("meta"):
        model, x = Stack(sizes, layers), torch.empty(sizes.rows, sizes.width)
    return trace(model, ((x,), {}))


def scheme_pins(scheme: Scheme, sizes: Sizes) -> Pins:
    """Products as the scheme says, and parameters stored in as many parts as can be (see `stored`)."""
    return Pins(allow_option=_as_cut(scheme, sizes), allow_param=_as_stored(scheme))


def _as_cut(scheme: Scheme, sizes: Sizes) -> Callable[[fx.Node, OpOption], bool]:
    def letters(node: fx.Node) -> tuple[str, dict[int, str]]:
        if module_path(node).endswith("up"):
            return scheme.up, {sizes.rows: "M", sizes.inner: "N", sizes.width: "K"}
        return scheme.down, {sizes.rows: "M", sizes.width: "N", sizes.inner: "K"}

    def allow(node: fx.Node, option: OpOption) -> bool:
        if node.target is not torch.ops.aten.mm.default:
            return True
        cuts, letter = letters(node)
        tensors = [*(o.meta["val"] for o in operands(node)), *result_metas(node)]
        names = ["".join(letter[int(s)] for s in t.shape) for t in tensors if t is not None]
        wanted = [tuple(_placed(c, dims) for c in cuts) for dims in names[:2]]
        summed = tuple(_placed(c, names[2], PARTIAL) for c in cuts)
        return list(option.operand_states) == wanted and option.result_states == (summed,)

    return allow


def _placed(cut: str, dims: str, otherwise: str = REPLICATE) -> str:
    return shard(dims.index(cut)) if cut in dims else otherwise


def _as_stored(scheme: Scheme) -> Callable[[ParamInfo, State], bool]:
    def allow(param: ParamInfo, state: State) -> bool:
        cuts = scheme.up if ".up." in param.fqn else scheme.down
        return state == stored(cuts)

    return allow


def stored(cuts: str) -> State:
    """How a weight [N, K] is stored: as the product wants it, and besides in the parts of an axis that cuts the rows M.

    That axis cuts a dim which no later axis cuts, so that the weight can be gathered along it alone. Where both are cut
    later the weight is whole there (3D: its gradient is summed everywhere instead of scattered, which sends no more).
    Of several such axes the last one cuts (2.5D: layers of ranks with copies of the weights).
    """
    state = [_placed(c, "NK") for c in cuts]
    rows = [axis for axis, c in enumerate(cuts) if c == "M"]
    free = [dim for dim in (0, 1) if rows and shard(dim) not in state[rows[-1] + 1 :]]
    if free:
        state[rows[-1]] = shard(free[0])
    return tuple(state)


@dataclass(frozen=True)
class Measured:
    """One plan. emitted_bytes, planned_bytes: that a rank sends in a step. peak_bytes: of a rank, simulated.

    cuts: of the products of the second layer, as in a `Scheme`, "-" where an axis cuts none.
    """

    decisions: Decisions
    emitted_bytes: Fraction
    planned_bytes: Fraction
    step_s: float
    peak_bytes: int
    params_bytes: int
    cuts: tuple[str, ...]


def measure(traced: Trace, cluster: ClusterSpec, mesh: Sequence[int], pins: Pins | None = None) -> Measured:
    """Plan on a mesh without a memory limit, emit, and count. pins: what is prescribed; None: nothing."""
    mesh = tuple(mesh)
    costs, optimizer = CostModel(cluster, mesh), OptimizerSpec("none")
    stated = build_problem(traced, costs, optimizer, pins=pins)
    decisions = stated.decisions(solve(stated.problem, gap=GAP).solution)
    program = emit(traced, decisions, mesh, costs)
    priced = price(traced, decisions, costs, optimizer)
    traffic = emitted_traffic(program)
    params = sum(_stored_bytes(p, decisions.params[p.fqn], mesh) for p in traced.params)
    planned = planned_traffic(priced, mesh)
    peak = simulate_memory(program, params).peak_bytes
    return Measured(
        decisions, _sum(traffic.values()), _sum(planned.values()), priced.step_time_s, peak, params,
        _cuts(traced, decisions),
    )  # fmt: skip


def _cuts(traced: Trace, decisions: Decisions) -> tuple[str, ...]:
    letter = {shard(0): "M", shard(1): "N", PARTIAL: "K"}
    nodes = [n for n in traced.graph_module.graph.nodes if n.target is torch.ops.aten.mm.default and not is_backward(n)]
    rules = [decisions.nodes[n.name].rules for n in nodes if "layers.1" in module_path(n)]
    return tuple("".join(letter.get(r.outputs[0] or "", "-") for r in of_axes) for of_axes in rules)


def _sum(values: object) -> Fraction:
    return sum(values, Fraction(0))  # type: ignore[call-overload,no-any-return]


def _stored_bytes(param: ParamInfo, state: State, mesh: Sequence[int]) -> int:
    parts = math.prod(s for s, p in zip(mesh, state, strict=True) if p != REPLICATE)
    return math.prod(param.shape) * ITEM_BYTES // parts
