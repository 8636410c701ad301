"""What a pinned tensor degree says of the loss: the vocabulary stays cut, as Megatron-LM has it.

A loss over parts of the vocabulary sends a few numbers for each token (Shoeybi et al. 2019, section 3). A gather of the
logits is one message and may be sooner done where there are few of them, but then memory grows with the vocabulary.
"""

from __future__ import annotations

import torch
from torch import fx

from autopar.dataflow import result_metas
from autopar.pin_sequence import has_row_of_each_token
from autopar.placements import shard_dim
from autopar.rules import operands
from autopar.sharding import OpOption

aten = torch.ops.aten
_OF_CLASSES = frozenset(
    {
        aten._log_softmax.default,
        aten._log_softmax_backward_data.default,
        aten.nll_loss_forward.default,
        aten.nll_loss_backward.default,
    }
)


def holds_vocabulary_whole(node: fx.Node, option: OpOption, axis: int, lead: tuple[int, ...]) -> bool:
    """Whether an op of a loss over tokens has all classes of some on every rank of an axis.

    lead: batch and sequence of the model's input. Losses over a few classes of whole samples are left alone.
    """
    if node.target not in _OF_CLASSES or lead[1] == 1:
        return False
    tensors = [(operand.meta["val"], s) for operand, s in zip(operands(node), option.operand_states, strict=True)]
    tensors += [(t, s) for t, s in zip(result_metas(node), option.result_states, strict=True) if t is not None and s]
    return any(
        shard_dim(state[axis]) != tensor.dim() - 1
        for tensor, state in tensors
        if tensor.is_floating_point() and tensor.dim() > 1 and has_row_of_each_token(tensor, lead)
    )
