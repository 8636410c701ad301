"""`train_step` puts gradients where autograd would, and leaves it to autograd where somebody listens."""

from __future__ import annotations

import torch
from torch import nn

import autopar
from autopar.runtime.gradients import accumulate, is_watched

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class TwoBiases(nn.Module):
    """Two parameters with one gradient, and one that is summed up as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8, dtype=torch.float64)
        self.more = nn.Parameter(torch.zeros(8, dtype=torch.float64))
        self.summed = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(8, dtype=torch.float64), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.lin(x) + self.more * 1 + self.frozen).square().mean() + self.summed.sum()


def compiled(model: nn.Module) -> nn.Module:
    return autopar.compile(model, autopar.ClusterSpec.preset("cpu", gpus=1), example_inputs=((X,), {}))


def test_gradients_of_several_steps() -> None:
    model = TwoBiases()
    program = compiled(model)
    for _ in range(2):  # gradients are added up
        model(X).backward()
        program.train_step(X)
        grads = {name: p.grad for name, p in program.named_parameters()}
        assert grads.pop("frozen") is None
        for name, grad in grads.items():
            torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-12, atol=1e-15)
    assert len({grad.data_ptr() for grad in grads.values()}) == len(grads), "two parameters share a gradient"
    for name, grad in grads.items():
        assert grad.stride() == model.get_parameter(name).stride()


def test_hooks_are_called() -> None:
    model = TwoBiases()
    program = compiled(model)
    told: list[str] = []
    more = program.get_parameter("more")
    more.register_hook(lambda grad: told.append("grad") or 2 * grad)
    program.get_parameter("summed").register_post_accumulate_grad_hook(lambda param: told.append("accumulated"))
    program.train_step(X)
    model(X).backward()
    assert sorted(told) == ["accumulated", "grad"]
    torch.testing.assert_close(more.grad, 2 * model.more.grad)


def test_what_others_hold_is_copied() -> None:
    params = [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    shared = torch.ones(2, 3)
    accumulate(params, [shared, shared, torch.ones(1).expand(2, 3)])
    params[0].grad.add_(1)
    assert params[0].grad is shared and not is_watched(params[0])
    assert params[1].grad.eq(1).all()
    assert params[2].grad.stride() == (3, 1)
