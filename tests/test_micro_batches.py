"""Which weights the losses of micro-batches have, and which losses have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autopar.errors import TraceError
from autopar.micro_batches import MicroBatchLoss, micro_batch_loss
from autopar.trace import trace

WIDTH, CLASSES, COUNT = 6, 5, 4
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """A linear layer and a loss of (scores, target, mask)."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
        self.register_buffer("class_weight", torch.linspace(0.5, 1.5, CLASSES, dtype=torch.float64))
        self.loss = loss

    def forward(self, x: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.loss is weighted:
            return nn.functional.cross_entropy(self.layer(x), target, self.class_weight, ignore_index=-1)
        return self.loss(self.layer(x), target, mask)


class Normed(nn.Module):
    """A batch norm in training."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out.pow(2).mean()


def inputs(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, CLASSES, (batch,), generator=generator)
    target[: batch // 3] = -1
    mask = (torch.rand(batch, generator=generator) < 0.6).double()
    return {"x": torch.randn(batch, WIDTH, generator=generator, dtype=torch.float64), "target": target, "mask": mask}


def part(call: dict[str, Any], index: int) -> dict[str, Any]:
    return {name: value.chunk(COUNT)[index] for name, value in call.items()}


def weighted(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    raise AssertionError("written out in the model, which holds the weights")


def mean(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return 2 * scores.pow(2).mean() / 3


def total(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return -scores.sin().sum()


def ignoring(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(scores, target, ignore_index=-1)


def masked_mean(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (scores.pow(2).sum(1) * mask).sum() / mask.sum()


def two_means(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores.mean() + ignoring(scores, target, mask)


def centred(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (scores - scores.mean(0)).pow(2).mean()


def squared(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores.mean().pow(2)


def by_batch_size(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores.sum() / scores.shape[0]


def numbered(scores: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (scores * torch.arange(scores.shape[0])[:, None]).sum()


def found(loss: Loss) -> tuple[MicroBatchLoss, Model, dict[str, Any]]:
    model, call = Model(loss), inputs(24)
    return micro_batch_loss(trace(model, ((), call)), trace(model, ((), part(call, 0)))), model, call


@pytest.mark.parametrize(
    ("loss", "kind"),
    [(mean, "mean"), (total, "sum"), (ignoring, "counted"), (weighted, "counted"), (masked_mean, "counted")],
)
def test_the_weighed_sum_is_the_loss(loss: Loss, kind: str) -> None:
    of, model, call = found(loss)
    assert of.weight.kind == kind
    parts = [part(call, index) for index in range(COUNT)]
    names = {i.path: i.node for i in of.trace.inputs}
    buffers = {b.node: dict(model.named_buffers())[b.fqn] for b in of.trace.buffers}
    weights = of.weights([{**buffers, **{names[k]: v for k, v in p.items() if k in names}} for p in parts])
    together = sum(w * model(**p) for w, p in zip(weights, parts, strict=True) if w)
    assert together.item() == pytest.approx(model(**call).item(), rel=1e-12)
    assert (len(set(weights)) > 1) == (kind == "counted")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (two_means, r"add.* takes all samples at once; use one micro-batch"),
        (centred, r"takes all samples at once; use one micro-batch"),
        (squared, r"pow.* takes all samples at once; use one micro-batch"),
        (by_batch_size, r"div.* computes with the batch size \(24, 6 in a micro-batch\); use one micro-batch"),
        (numbered, r"takes all samples at once; use one micro-batch"),
    ],
)
def test_what_no_micro_batch_knows(loss: Loss, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        found(loss)


def test_batch_norm_is_named() -> None:
    model = Normed()
    with pytest.raises(TraceError, match=r"buffer inner\.1\.running_mean takes statistics .* in module inner\.1"):
        micro_batch_loss(*(trace(model, ((torch.randn(n, WIDTH),), {})) for n in (8, 4)))


def test_a_model_without_a_loss() -> None:
    model = nn.Linear(WIDTH, 4)
    with pytest.raises(TraceError, match="without a loss"):
        micro_batch_loss(*(trace(model, ((torch.randn(n, WIDTH),), {})) for n in (8, 4)))


def test_a_batch_that_is_no_multiple() -> None:
    model, call = Model(mean), inputs(24)
    with pytest.raises(TraceError, match="micro-batches do not divide the batch"):
        micro_batch_loss(trace(model, ((), call)), trace(model, ((), inputs(7))))
