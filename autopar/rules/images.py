"""Rules of convolutions, pools, pads and resampling: [N, C, *pixels], the pixels never cut.

Samples are independent of each other in all of these ops, and channels in all but the
convolutions (which know input and output channels, in groups that are independent).
"""

from __future__ import annotations

from collections.abc import Callable

from autopar.placements import PARTIAL, REPLICATE, Placement, shard
from autopar.rules.schema import OpCall
from autopar.rules.types import AxisRule

Taken = dict[str, Placement | None]


def _weight_dims(call: OpCall) -> tuple[int, int]:
    """The dims of the weight that count output and input channels."""
    return (1, 0) if call.arg("transposed") else (0, 1)


def convolution(call: OpCall) -> list[AxisRule]:
    """(input [N, C, *], weight [O, C / groups, *], or [C, O / groups, *] if transposed, bias [O]) -> [N, O, *].

    Cut by samples, by output channels, by input channels (summands, the bias being one too), or by groups.
    """
    made, taken = _weight_dims(call)
    samples = call.rule({"input": shard(0)}, shard(0))
    groups = call.arg("groups")
    if groups > 1:
        cut: Taken = {"input": shard(1), "weight": shard(0), "bias": shard(0)}
        return [samples, call.rule(cut, shard(1), units=groups)]
    return [
        samples,
        call.rule({"weight": shard(made), "bias": shard(0)}, shard(1)),
        call.rule({"input": shard(1), "weight": shard(taken), "bias": PARTIAL}, PARTIAL),
    ]


def convolution_backward(call: OpCall) -> list[AxisRule]:
    """-> (grad_input, grad_weight, grad_bias)."""
    made, taken = _weight_dims(call)
    samples = call.rule({"grad_output": shard(0), "input": shard(0)}, (shard(0), PARTIAL, PARTIAL))
    groups = call.arg("groups")
    if groups > 1:
        cut: Taken = {"grad_output": shard(1), "input": shard(1), "weight": shard(0)}
        return [samples, call.rule(cut, (shard(1), shard(0), shard(0)), units=groups)]
    return [
        samples,
        call.rule({"grad_output": shard(1), "weight": shard(made)}, (PARTIAL, shard(made), shard(0))),
        call.rule({"input": shard(1), "weight": shard(taken)}, (shard(1), shard(taken), REPLICATE)),
    ]


def by_channel(pixels: int) -> Callable[[OpCall], list[AxisRule]]:
    """Ops that see every channel of every sample alone: all dims but the last `pixels` can be cut, in all tensors."""

    def rules(call: OpCall) -> list[AxisRule]:
        ranks = {t.dim() for t in (*call.inputs, *call.outputs) if t is not None}
        if len(ranks) != 1:
            return []
        return [
            AxisRule(tuple(shard(d) for _ in call.inputs), tuple(None if t is None else shard(d) for t in call.outputs))
            for d in range(ranks.pop() - pixels)
        ]

    return rules


def channel_blocks(call: OpCall) -> list[AxisRule]:
    """pixel_shuffle, im2col and their inverses, [N, C, ...]: a channel becomes, or comes from, a run of channels."""
    if min(call.inputs[0].dim(), call.out.dim()) < 3 or call.inputs[0].shape[0] != call.out.shape[0]:
        return []  # without a batch
    return [call.rule({"self": shard(d)}, shard(d)) for d in range(2)]


def grid_sampler(call: OpCall) -> list[AxisRule]:
    """(input [N, C, *], grid [N, *, dims]) -> [N, C, *]: every channel is sampled at the same places."""
    return [
        call.rule({"input": shard(0), "grid": shard(0)}, shard(0)),
        call.rule({"input": shard(1)}, shard(1)),
    ]


def grid_sampler_backward(call: OpCall) -> list[AxisRule]:
    """-> (grad_input, grad_grid); channels leave summands for the grid."""
    return [
        call.rule({n: shard(0) for n in ("grad_output", "input", "grid")}, shard(0)),
        call.rule({"grad_output": shard(1), "input": shard(1)}, (shard(1), PARTIAL)),
    ]


_SIZES = (("1d", 1), ("2d", 2), ("3d", 3))
_RESIZES = (
    ("nearest1d", 1), ("nearest2d", 2), ("nearest3d", 3), ("linear1d", 1), ("bilinear2d", 2), ("bicubic2d", 2),
    ("trilinear3d", 3),
)  # fmt: skip
RESIZES_BACKWARD = frozenset(f"aten.upsample_{kind}_backward" for kind, _ in _RESIZES)

IMAGES: dict[str, Callable[[OpCall], list[AxisRule]]] = {
    "aten.convolution": convolution,
    "aten.convolution_backward": convolution_backward,
    "aten.grid_sampler_2d": grid_sampler,
    "aten.grid_sampler_2d_backward": grid_sampler_backward,
    **{
        f"aten.{pool}{ending}": by_channel(pixels)
        for size, pixels in _SIZES[1:]
        for pool in (f"avg_pool{size}", f"_adaptive_avg_pool{size}", f"max_pool{size}_with_indices")
        for ending in ("", "_backward")
    },
    **{
        f"aten.{pad}_pad{size}{ending}": by_channel(pixels)
        for size, pixels in _SIZES
        for pad in ("reflection", "replication")
        for ending in ("", "_backward")
    },
    **{f"aten.upsample_{kind}{ending}": by_channel(n) for kind, n in _RESIZES for ending in ("", "_backward")},
    **{f"aten.{name}": channel_blocks for name in ("pixel_shuffle", "pixel_unshuffle", "im2col", "col2im")},
    **{f"aten.adaptive_max_pool2d{ending}": by_channel(2) for ending in ("", "_backward")},
}
