"""The micro-batches of a call, cut as a structure or leaf by leaf."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from autopar.batch_parts import split_call, split_leaves
from autopar.errors import PlanMismatch
from autopar.trace import input_leaves


class Takes(nn.Module):
    """Takes inputs and does nothing."""

    def forward(self, x: torch.Tensor, options: dict[str, Any], scale: float = 1.0) -> None:
        """Nothing."""


CALL: Any = (
    (torch.arange(12.0).reshape(6, 2),),
    {"options": {"mask": torch.arange(6), "table": torch.arange(4), "on": True}, "scale": 2.0},
)


def test_leaves_are_cut_as_the_call_is() -> None:
    model = Takes()
    parts = [input_leaves(model.forward, *part) for part in split_call(model, CALL, 3)]
    leaves = split_leaves(input_leaves(model.forward, *CALL), 3)
    assert leaves[1]["x"].tolist() == [[4.0, 5.0], [6.0, 7.0]]
    assert leaves[1]["options.table"].tolist() == [0, 1, 2, 3]  # no batch
    for part, found in zip(parts, leaves, strict=True):
        assert list(part) == list(found)
        assert all(torch.equal(torch.as_tensor(part[path]), torch.as_tensor(found[path])) for path in part)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(PlanMismatch, match="the batch of 6 does not divide into 4 micro-batches; pass a multiple of 4"):
        split_leaves(input_leaves(Takes().forward, *CALL), 4)
