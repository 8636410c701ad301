"""Times of ops on this device: curves by size and dtype, attention, launches, views, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from autopar.cost.optimizer import OPTIMIZER
from autopar.curves import AttentionRate, OpCurve, rising
from autopar.profiling.cases import Arguments, Case, attention_shapes, cases, moved_bytes, work
from autopar.profiling.clock import Clock

aten = torch.ops.aten
POOL_BYTES, MOST_SETS = 64 << 20, 64  # inputs and results take turns, so that they are not always in the fastest cache
MOST_CALL_BYTES = 1 << 30
CHAIN = 64  # ops in the graph that measures launches
SLOW_S = 0.5  # a call that takes longer ends its curve

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Launches:
    """Seconds of the smallest op and of a view, each as one node of a program of different ones.

    cold_s: what an op takes more there than called again and again: it finds the caches and predictions of others.
    """

    op_s: float
    view_s: float
    cold_s: float


def measure_launches(clock: Clock) -> Launches:
    """Time programs of nothing but tiny ops, and of nothing but views."""
    tiny = torch.ones(4, 4, device=clock.device)
    ops: list[tuple[Any, tuple[Any, ...]]] = [
        *((target, ("x", "x")) for target in (aten.mul.Tensor, aten.add.Tensor, aten.mm.default)),
        *((target, ("x",)) for target in (aten.silu.default, aten.neg.default, aten.rsqrt.default, aten.clone.default)),
        (aten.pow.Tensor_Scalar, ("x", 2)),
        (aten.mul.Scalar, ("x", 0.5)),
        (aten._softmax.default, ("x", -1, False)),
        (aten.mean.dim, ("x", [-1], True)),
        (aten.sum.dim_IntList, ("x", [0], True)),
    ]
    views: list[tuple[Any, tuple[Any, ...]]] = [
        (aten.t.default, ("x",)),
        (aten.transpose.int, ("x", 0, 1)),
        (aten.view.default, ("x", [4, 4])),
        (aten.slice.Tensor, ("x", 0, 0, 2)),
        (aten.unsqueeze.default, ("x", 1)),
        (aten.expand.default, ("x", [4, 4])),
    ]
    with torch.no_grad():
        op_s, view_s = (_node_s(clock, calls, tiny) for calls in (ops, views))
        alone = [_node_s(clock, [call], tiny) for call in ops]
    return Launches(op_s, view_s, max(0.0, op_s - sum(alone) / len(alone)))


def _node_s(clock: Clock, calls: list[tuple[Any, tuple[Any, ...]]], x: torch.Tensor) -> float:
    """Seconds per node of a program of CHAIN nodes that take turns; "x" stands for its input."""
    module = _program(calls)
    return clock.seconds(lambda _: module(x)) / CHAIN


def _program(calls: list[tuple[Any, tuple[Any, ...]]]) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    at = x
    for i in range(CHAIN):
        target, args = calls[i % len(calls)]
        at = graph.call_function(target, tuple(x if isinstance(a, str) else a for a in args))
    graph.output(at)
    return fx.GraphModule(torch.nn.Module(), graph)


def measure_ops(
    clock: Clock, dtypes: tuple[str, ...], cold_s: float, quick: bool, progress: Progress
) -> tuple[OpCurve, ...]:
    """A curve per op and dtype.

    An op that torch does not have in a dtype on this device gets none. cold_s: added to all, see `Launches`.
    """
    found = []
    for dtype in dtypes:
        for case in cases(quick):
            if not _asked(case, dtype, quick):
                continue
            progress(f"{case.names[0]} in {dtype}")
            points = rising((size, seconds + cold_s) for size, seconds in _case_points(clock, case, dtype))
            found += [OpCurve(name, dtype, points) for name in case.names if points]
    return tuple(found)


def _asked(case: Case, dtype: str, quick: bool) -> bool:
    """Whether to measure an op in a dtype: matrix products in all of them; in rare ones, or quickly, little else."""
    if dtype == "float32" or (dtype == "bfloat16" and not quick):
        return True
    return bool(set(case.names) & ({"matmul"} if quick else {"matmul", "elementwise", "convolution"}))


def _case_points(clock: Clock, case: Case, dtype: str) -> Iterator[tuple[float, float]]:
    for size in case.sizes:
        try:
            with torch.no_grad():
                arguments = partial(case.arguments, _maker(clock, dtype), size)
                size_of_call, seconds = _time(clock, case.target, arguments)
        except (RuntimeError, NotImplementedError):  # not implemented in this dtype, or more memory than there is
            return
        yield size_of_call, seconds
        if seconds > SLOW_S:
            return


def _maker(clock: Clock, dtype: str) -> Callable[..., torch.Tensor]:
    kind = getattr(torch, dtype)
    return lambda *shape: torch.randn(shape, device=clock.device, dtype=torch.float32).to(kind)


def _time(clock: Clock, target: Any, arguments: Callable[[], Arguments]) -> tuple[float, float]:
    """(size, seconds) of an op on inputs that take turns."""
    first = arguments()
    result = target(*first)
    nbytes = moved_bytes(first, result)
    if nbytes > MOST_CALL_BYTES:
        raise RuntimeError("larger than what is measured")
    sets = [first, *(arguments() for _ in range(min(MOST_SETS, int(POOL_BYTES / nbytes)) - 1))]
    kept = [result] * len(sets)  # a program's results live for a while too

    def call(i: int) -> None:
        at = i % len(sets)
        kept[at] = target(*sets[at])

    return work(target, first, result), clock.seconds(call)


# -- attention ----------------------------------------------------------------------------


def measure_attention(
    clock: Clock, dtypes: tuple[str, ...], cold_s: float, quick: bool, progress: Progress
) -> tuple[AttentionRate, ...]:
    """Scaled dot product attention, causal and not, in whichever kernel torch picks here."""
    found = []
    for dtype in dtypes:
        progress(f"attention in {dtype}")
        samples: dict[str, list[tuple[float, float, float]]] = {"forward": [], "backward": []}
        for heads, length, width in attention_shapes(quick):
            for causal in (True, False):
                shape = (1, heads, length, width)
                for direction, sample in _attention_samples(clock, dtype, shape, causal):
                    samples[direction].append(sample)
        for direction, rows in samples.items():
            if rows:
                overhead_s, flop_s, byte_s = fit_rates(rows)
                found.append(AttentionRate(direction, dtype, overhead_s + cold_s, 1 / flop_s, 1 / byte_s))
    return tuple(found)


def _attention_samples(
    clock: Clock, dtype: str, shape: tuple[int, ...], causal: bool
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """("forward" or "backward", (FLOPs, bytes, seconds)); nothing if this device has no attention in this dtype."""
    from torch.nn.functional import scaled_dot_product_attention

    new = _maker(clock, dtype)
    try:
        query, key, value = (new(*shape).requires_grad_() for _ in range(3))
        made = scaled_dot_product_attention(query, key, value, is_causal=causal)
        gradient = new(*shape)

        def backward(_: int) -> object:
            return torch.autograd.grad(made, (query, key, value), gradient, retain_graph=True)

        def forward(_: int) -> object:
            with torch.no_grad():
                return scaled_dot_product_attention(query, key, value, is_causal=causal)

        seconds = {"forward": clock.seconds(forward), "backward": clock.seconds(backward)}
    except (RuntimeError, NotImplementedError):
        return
    batch, heads, length, width = shape
    pairs = batch * heads * length * length * ((length + 1) / (2 * length) if causal else 1.0)
    tensor_bytes = query.numel() * query.element_size()
    # The same counts as `autopar.cost.compute`: 2 products forward, 5 backward; tensors read and written.
    yield "forward", (4.0 * pairs * width, 4.0 * tensor_bytes, seconds["forward"])
    yield "backward", (10.0 * pairs * width, 8.0 * tensor_bytes, seconds["backward"])


def fit_rates(samples: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(seconds per call, per FLOP, per byte) that explain (FLOPs, bytes, seconds) with the least relative error.

    None is negative: of all subsets of the three, the best whose least squares are all positive is taken, and what is
    left out costs (next to) nothing.
    """
    rows = np.array([(1 / s, f / s, b / s) for f, b, s in samples])
    best, least = np.full(3, 1e-18), float("inf")
    for chosen in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        part, *_ = np.linalg.lstsq(rows[:, chosen], np.ones(len(rows)), rcond=None)
        error = float(np.square(rows[:, chosen] @ part - 1.0).sum())
        if (part > 0).all() and error < least:
            best, least = np.full(3, 1e-18), error
            best[chosen] = np.maximum(part, 1e-18)
    return float(best[0]), float(best[1]), float(best[2])


# -- optimizer ------------------------------------------------------------------------------


def _step(optimizer: torch.optim.Optimizer, _: int) -> None:
    optimizer.step()


def measure_optimizer(
    clock: Clock, wrap: Callable[[torch.Tensor], torch.Tensor], quick: bool, progress: Progress
) -> OpCurve:
    """AdamW as torch.optim runs it by default, per parameter.

    wrap: what makes a parameter of a tensor, as a program has them (DTensors, where there are several ranks).
    """
    progress("optimizer")
    count = 8
    points = []
    for elements in (1 << k for k in ((8, 14, 18) if quick else (8, 12, 14, 16, 18, 20, 22))):
        params = [torch.nn.Parameter(wrap(torch.randn(elements, device=clock.device))) for _ in range(count)]
        for param in params:
            param.grad = wrap(torch.randn(elements, device=clock.device))
        optimizer = torch.optim.AdamW(params, lr=1e-6)
        seconds = clock.seconds(partial(_step, optimizer)) / count
        points.append((7.0 * 4 * elements, seconds))  # parameter, gradient and two states read, all but one written
    return OpCurve(OPTIMIZER, "float32", rising(points))
