"""A pipeline written by hand: stage i multiplies by its own vector, the last one sums up; the first and the last also
add the same (tied) vector. Small enough to say in one line what a step must give."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from autopar._torch_compat import FakeTensorMode
from autopar.codegen.builder import GraphBuilder
from autopar.codegen.emit import Version
from autopar.codegen.stage_types import NOTHING, Message, PipelineProgram, StagePass, StageProgram

aten = torch.ops.aten
ROWS, WIDTH = 2, 3  # of a micro-batch


def chain(stages: int, dtype: torch.dtype = torch.float64) -> PipelineProgram:
    """The stages, each on a mesh without axes. Parameters w0, w1, ... and v; input x, tangent t, output loss."""
    kind = _Kind(FakeTensorMode(), dtype)
    owners = {**{f"w{i}": i for i in range(stages)}, "v": 0}
    return PipelineProgram((), tuple(_stage(i, stages, kind) for i in range(stages)), owners)


def expected_loss(values: dict[str, torch.Tensor], x: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """The same on one device, for a whole batch."""
    total = torch.zeros((), dtype=x.dtype)
    count = len(values) - 1
    for part, weight in zip(x.chunk(len(weights)), weights, strict=True):
        y = part + values["v"]
        for i in range(count):
            y = y * values[f"w{i}"]
        total = total + weight * (y + values["v"]).sum()
    return total


class _Kind(NamedTuple):
    """Of the tensors of a chain."""

    mode: FakeTensorMode
    dtype: torch.dtype


def _at(name: str) -> Version:
    return (name, ())


def _stage(index: int, stages: int, kind: _Kind) -> StageProgram:
    first, last = index == 0, index == stages - 1
    with kind.mode:
        block = torch.empty(ROWS, WIDTH, dtype=kind.dtype)
    weight, taken, made = _at(f"w{index}"), _at("x" if first else f"y{index - 1}"), _at(f"y{index}")
    grad_in, grad_out = _at("t" if last else f"d{index}"), _at(f"d{index - 1}")
    tied = ("v",) if first or last else ()
    return StageProgram(
        index=index,
        mesh=(),
        forward=_forward(kind, taken, weight, first, last),
        backward=_backward(kind, grad_in, weight, last),
        weights=_weights(kind, _at(f"g{index}"), _at(f"x{index}"), weight, first, last),
        reduce=_identity(kind, 1 + len(tied)),
        receives_forward=NOTHING if first else Message((taken,), (block,)),
        sends_forward=NOTHING if last else Message((made,), (block,)),
        receives_backward=NOTHING if last else Message((grad_in,), (block,)),
        sends_backward=NOTHING if first else Message((grad_out,), (block,)),
        saved_forward=(_at(f"x{index}"),),
        saved_backward=(_at(f"g{index}"),),
        params=(f"w{index}", *tied),
        outputs=("loss",) if last else (),
        grads_early=(),
        grads_late=(f"w{index}", *tied),
    )


class _Hand:
    """A graph in the making."""

    def __init__(self, kind: _Kind) -> None:
        self.builder, self.inputs, self.dtype = GraphBuilder((), kind.mode), [], kind.dtype

    def take(self, version: Version) -> fx.Node:
        self.inputs.append(version)
        shape = (ROWS, WIDTH) if version[0][0] in "xydg" else () if version[0] == "t" else (WIDTH,)
        return self.builder.local_input(version[0], torch.empty(0, dtype=self.dtype), shape)

    def close(self, *results: fx.Node) -> StagePass:
        self.builder.output(results)
        return StagePass(self.builder.graph, tuple(self.inputs))


def _forward(kind: _Kind, taken: Version, weight: Version, first: bool, last: bool) -> StagePass:
    hand = _Hand(kind)
    x, w = hand.take(taken), hand.take(weight)
    v = hand.take(_at("v")) if first or last else None
    call = hand.builder.call
    x = call(aten.add.Tensor, x, v) if first else x
    y = call(aten.mul.Tensor, x, w)
    if last:
        y = call(aten.sum.default, call(aten.add.Tensor, y, v))
    return hand.close(y, x)


def _backward(kind: _Kind, grad: Version, weight: Version, last: bool) -> StagePass:
    hand = _Hand(kind)
    g, w = hand.take(grad), hand.take(weight)
    g = hand.builder.call(aten.expand.default, g, [ROWS, WIDTH]) if last else g
    sent = hand.builder.call(aten.mul.Tensor, g, w)
    return hand.close(*([] if weight[0] == "w0" else [sent]), g)


def _weights(kind: _Kind, grad: Version, x: Version, weight: Version, first: bool, last: bool) -> StagePass:
    hand = _Hand(kind)
    g, taken = hand.take(grad), hand.take(x)
    call = hand.builder.call
    own = [call(aten.sum.dim_IntList, call(aten.mul.Tensor, g, taken), [0])]
    if last:
        own.append(call(aten.sum.dim_IntList, g, [0]))
    elif first:
        own.append(call(aten.sum.dim_IntList, call(aten.mul.Tensor, g, hand.take(weight)), [0]))
    return hand.close(*own)


def _identity(kind: _Kind, count: int) -> fx.Graph:
    hand = _Hand(kind)
    return hand.close(*(hand.take(_at(f"s{i}")) for i in range(count))).graph
