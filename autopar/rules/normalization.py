"""Rules of batch norm, group norm and weight norm.

In a training step batch norm takes its statistics over the whole batch, wherever that lies:
the lowering "batch_norm" (codegen.statistics) exchanges two numbers per channel.
"""

from __future__ import annotations

from autopar.placements import PARTIAL, REPLICATE, Placement, shard
from autopar.rules.schema import OpCall, normalized
from autopar.rules.types import AxisRule, InnerCollective

_CHANNELS = ("weight", "bias", "running_mean", "running_var", "save_mean", "save_invstd")


def _of_channels(call: OpCall) -> dict[str, Placement | None]:
    """Every vector of channels cut; in evaluation some are empty."""
    given = {name: call.tensor(name) for name in _CHANNELS}
    return {name: shard(0) for name, t in given.items() if t is not None and t.numel()}


def batch_norm(call: OpCall) -> list[AxisRule]:
    """(input [N, C, *], weight, bias, running_mean, running_var: [C]) -> (out, mean, invstd, ...: [C] or empty).

    Channels are independent; anything else can be cut too, but for training the statistics are exchanged.
    """
    rest = call.outputs[1:]
    training = bool(call.arg("training", False))
    per_channel = tuple(shard(0) if t is not None and t.numel() else REPLICATE for t in rest)
    rules = [call.rule({"input": shard(1), **_of_channels(call)}, (shard(1), *per_channel))]
    statistics = (InnerCollective("all_reduce", ("out", 1), copies=2),) if training else ()
    for dim in range(call.out.dim()):
        if dim != 1:
            made = (shard(dim), *(REPLICATE for _ in rest))
            lowering = "batch_norm" if training else "local"
            rules.append(call.rule({"input": shard(dim)}, made, lowering, collectives=statistics))
    return rules


def batch_norm_backward(call: OpCall) -> list[AxisRule]:
    """-> (grad_input, grad_weight, grad_bias).

    In training the gradient of every element has its share in that of the statistics: the sums are
    exchanged inside, and so come out whole. In evaluation they are summands.
    """
    grads = {"grad_out", "input"}
    rules = [call.rule({**dict.fromkeys(grads, shard(1)), **_of_channels(call)}, (shard(1), shard(0), shard(0)))]
    source = call.tensor("input")
    assert source is not None
    for dim in range(source.dim()):
        taken = dict.fromkeys(grads, shard(dim))
        if dim != 1 and call.arg("train"):
            moved = (InnerCollective("all_reduce", ("in", call.slots["save_mean"][0]), copies=2),)
            made = (shard(dim), REPLICATE, REPLICATE)
            rules.append(call.rule({**taken}, made, "batch_norm_backward", collectives=moved))
        elif dim != 1:
            rules.append(call.rule({**taken}, (shard(dim), PARTIAL, PARTIAL)))
    return rules


def group_norm(call: OpCall) -> list[AxisRule]:
    """(input [N, C, *], weight [C], bias [C]) -> (out, mean [N, G], rstd [N, G]): cut samples, or whole groups."""
    return [
        call.rule({"input": shard(0)}, shard(0)),
        call.rule({"input": shard(1), "weight": shard(0), "bias": shard(0)}, shard(1)),
    ]


def group_norm_backward(call: OpCall) -> list[AxisRule]:
    """-> (grad_input, grad_weight [C], grad_bias [C])."""
    over = ("grad_out", "input", "mean", "rstd")
    samples: dict[str, Placement | None] = {**dict.fromkeys(over, shard(0))}
    channels: dict[str, Placement | None] = {**dict.fromkeys(over, shard(1)), "weight": shard(0)}
    return [
        call.rule(samples, (shard(0), PARTIAL, PARTIAL)),
        call.rule(channels, (shard(1), shard(0), shard(0))),
    ]


def weight_norm(call: OpCall) -> list[AxisRule]:
    """_weight_norm_interface (v, g, dim), and backward: one norm per slice along `dim`, in tensors of as many dims."""
    source = call.inputs[0]
    dim = normalized(call.arg("dim"), source.dim())
    if any(t is not None and t.dim() != source.dim() for t in (*call.inputs, *call.outputs)):
        return []
    return [AxisRule((shard(dim),) * len(call.inputs), (shard(dim),) * len(call.outputs))]


NORMALIZATION = {
    "aten._weight_norm_interface": weight_norm,
    "aten._weight_norm_interface_backward": weight_norm,
    "aten._native_batch_norm_legit_functional": batch_norm,
    "aten._native_batch_norm_legit": batch_norm,
    "aten._native_batch_norm_legit_no_training": batch_norm,
    "aten.native_batch_norm_backward": batch_norm_backward,
    "aten.native_group_norm": group_norm,
    "aten.native_group_norm_backward": group_norm_backward,
}
