"""What a pinned context degree says of the ops: sequences are cut on its axes, weights are not.

What has one row for every token, or a number for each, is nowhere whole on such an axis where an op can do without:
not the logits, not the loss, not keys and values. So activations shrink as the axis grows, whatever it would save in
time to put one of them together.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from autopar.dataflow import resolve, result_metas
from autopar.placements import PARTIAL, REPLICATE, Placement, in_groups, is_dealt, shard_dim, shard_runs
from autopar.rules import operands
from autopar.sharding import OpOption
from autopar.trace import Trace


def along_sequence(tensor: torch.Tensor, placement: str, lead: tuple[int, ...]) -> bool | None:
    """Whether a cut of a tensor goes through its sequences; False: it parts the batch, None: it does neither.

    lead: batch and sequence of the model's input.
    """
    dim = shard_dim(placement)
    if dim is None or not tensor.dim() or in_groups(placement):
        return None
    if shard_runs(placement) > 1 or is_dealt(placement):
        return True
    batch, sequence = lead
    if dim == 0:
        return True if lead == (1, tensor.shape[0]) else False if tensor.shape[0] in (batch, batch * sequence) else None
    return True if tensor.shape[0] == batch and tensor.shape[dim] == sequence else None


def has_row_of_each_token(tensor: torch.Tensor, lead: tuple[int, ...]) -> bool:
    """Whether the first dim, or the first two, count all tokens of a batch. lead: batch and sequence of the input."""
    batch, sequence = lead
    return tensor.shape[0] == batch * sequence or tuple(tensor.shape[:2]) == lead


def lead_of(trace: Trace) -> tuple[int, ...] | None:
    """Batch and sequence of the first batched input that has both."""
    first = next((i for i in trace.inputs if i.batch_dim == 0 and len(i.shape) > 1), None)
    return tuple(first.shape[:2]) if first else None


def allow_context(node: fx.Node, option: OpOption, axis: int, slots: list[int], lead: tuple[int, ...] | None) -> bool:
    """Context axis: weights are used whole, the work is cut along the sequence and not along the batch."""
    if lead is None or any(option.operand_states[slot][axis] != "R" for slot in slots):
        return lead is None
    tensors = [(o.meta["val"], s) for o, s in zip(operands(node), option.operand_states, strict=True)]
    tensors += [(t, s) for t, s in zip(result_metas(node), option.result_states, strict=True) if t is not None and s]
    cuts = [along_sequence(tensor, state[axis], lead) for tensor, state in tensors]
    return False not in cuts and (not slots or True in cuts)


def holds_sequences_whole(
    node: fx.Node, option: OpOption, axis: int, lead: tuple[int, ...], params: Collection[str]
) -> bool:
    """Whether every rank of an axis takes or makes whole sequences of numbers. params: nodes of parameters.

    What is counted (token numbers, labels, positions) may be whole: inputs are. Attention may have whole sequences of
    some heads; what has a row for each token, like logits, is cut along the sequence.
    """
    if ".new_" in str(node.target):  # takes nothing of its operand but the kind of its numbers
        return False
    taken = [
        (operand.meta["val"], state[axis])
        for operand, state in zip(operands(node), option.operand_states, strict=True)
        if resolve(operand).node.name not in params
    ]
    made = [(t, s[axis]) for t, s in zip(result_metas(node), option.result_states, strict=True) if t is not None and s]
    return any(_is_whole(tensor, placement, lead) for tensor, placement in (*taken, *made))


def _is_whole(tensor: torch.Tensor, placement: Placement, lead: tuple[int, ...]) -> bool:
    """Whether a tensor of numbers holds something for every token, and so does each rank's part of it."""
    batch, sequence = lead
    if placement == PARTIAL or not tensor.is_floating_point() or not tensor.dim():
        return False
    if has_row_of_each_token(tensor, lead):
        return not along_sequence(tensor, placement, lead)
    return placement == REPLICATE and tensor.shape[0] in (1, batch) and sequence in tensor.shape[1:]
