"""Rules of embeddings, softmax and the loss, with the vocabulary (or class) dim cut too.

Their lowerings (codegen.lowerings) work on a rank's own range of classes and combine
small per-row statistics inside the op (Shoeybi et al. 2019, "Megatron-LM", section 3).
"""

from __future__ import annotations

from autopar.placements import PARTIAL, REPLICATE, Placement, shard
from autopar.rules.schema import OpCall, normalized
from autopar.rules.types import AxisRule, InnerCollective

_NONE = 0  # reduction of a loss: none, 1 mean, 2 sum


def embedding(call: OpCall) -> list[AxisRule]:
    """(weight [V, H], indices) -> indices' shape + [H]."""
    indices = call.tensor("indices")
    assert indices is not None
    rules = [call.rule({"indices": shard(d)}, shard(d)) for d in range(indices.dim())]
    rules.append(call.rule({"weight": shard(1)}, shard(indices.dim())))
    rules.append(call.rule({"weight": shard(0)}, PARTIAL, "vocab_embedding"))
    return rules


def embedding_backward(call: OpCall) -> list[AxisRule]:
    """(grad_output [*, H], indices [*]) -> [V, H]."""
    indices = call.tensor("indices")
    assert indices is not None
    hidden = call.rule({"grad_output": shard(indices.dim())}, shard(1))
    if call.arg("scale_grad_by_freq"):  # frequencies are those of the whole batch
        return [hidden]
    batch = [call.rule({"grad_output": shard(d), "indices": shard(d)}, PARTIAL) for d in range(indices.dim())]
    return [*batch, hidden, call.rule({}, shard(0), "vocab_embedding_backward")]


def _softmax(call: OpCall, own: str, statistics: int) -> list[AxisRule]:
    dim = normalized(call.arg("dim"), call.out.dim())
    moved = (InnerCollective("all_reduce", ("out", 0), (dim,)),) * statistics
    rules = []
    for d in range(call.out.dim()):
        if d == dim:
            rules.append(AxisRule((shard(d),) * len(call.inputs), (shard(d),), own, moved))
        else:
            rules.append(AxisRule((shard(d),) * len(call.inputs), (shard(d),)))
    return rules


def softmax(call: OpCall) -> list[AxisRule]:
    """Along the softmax dim: an all-reduced maximum and an all-reduced sum."""
    return _softmax(call, f"vocab{call.name.removeprefix('aten.')}", 2)


def safe_softmax(call: OpCall) -> list[AxisRule]:
    """Softmax with zeros for rows that are masked whole: every dim but its own."""
    dim = normalized(call.arg("dim"), call.out.dim())
    return [AxisRule((shard(d),), (shard(d),)) for d in range(call.out.dim()) if d != dim]


def softmax_backward(call: OpCall) -> list[AxisRule]:
    """Along the softmax dim: one all-reduced sum."""
    return _softmax(call, f"vocab{call.name.removeprefix('aten.').removesuffix('_data')}", 1)


def _samples_and_classes(call: OpCall) -> tuple[list[int], int]:
    """The dims of `self` that count samples (batch and pixels), and the class dim."""
    source = call.tensor("self")
    assert source is not None
    class_dim = 1 if source.dim() > 1 else 0
    return [d for d in range(source.dim()) if d != class_dim], class_dim


def _target_dim(dim: int, class_dim: int) -> int:
    return dim - (dim > class_dim)


def nll_loss(call: OpCall) -> list[AxisRule]:
    """(self [N, C, *], target [N, *], weight [C]) -> (loss, total_weight).

    The weights of the targets are summed over all ranks inside the op, for the mean and
    for backward; so the total is whole and a reduced loss is left as summands.
    """
    samples, class_dim = _samples_and_classes(call)
    reduced = call.arg("reduction") != _NONE
    total = (InnerCollective("all_reduce", ("out", 1), ()),) if reduced else ()
    rules = []
    for dim in samples:
        at = shard(_target_dim(dim, class_dim))
        made = (PARTIAL if reduced else at, REPLICATE)
        rules.append(call.rule({"self": shard(dim), "target": at}, made, "nll_loss", collectives=total))
    cut: dict[str, Placement | None] = {"self": shard(class_dim), "weight": shard(0)}
    rules.append(call.rule(cut, (PARTIAL, REPLICATE), "nll_loss", collectives=total))
    return rules


def nll_loss_backward(call: OpCall) -> list[AxisRule]:
    """(grad_output, self, target, weight, total_weight) -> grad of self; the total is that of the whole batch."""
    samples, class_dim = _samples_and_classes(call)
    reduced = call.arg("reduction") != _NONE
    rules = []
    for dim in samples:
        at = shard(_target_dim(dim, class_dim))
        grad = REPLICATE if reduced else at
        rules.append(call.rule({"self": shard(dim), "target": at, "grad_output": grad}, shard(dim)))
    cut: dict[str, Placement | None] = {"self": shard(class_dim), "weight": shard(0)}
    rules.append(call.rule(cut, shard(class_dim), "nll_loss_backward"))
    return rules


VOCAB = {
    "aten.embedding": embedding,
    "aten.embedding_dense_backward": embedding_backward,
    "aten._softmax": softmax,
    "aten._log_softmax": softmax,
    "aten._safe_softmax": safe_softmax,
    "aten._softmax_backward_data": softmax_backward,
    "aten._log_softmax_backward_data": softmax_backward,
    "aten.nll_loss_forward": nll_loss,
    "aten.nll_loss_backward": nll_loss_backward,
    "aten.nll_loss2d_forward": nll_loss,
    "aten.nll_loss2d_backward": nll_loss_backward,
}
