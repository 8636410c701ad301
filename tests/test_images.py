"""Channels innermost: which programs have them so, that what leaves is in the usual order, that numbers stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import autopar

aten = torch.ops.aten
CPU = autopar.ClusterSpec.preset("cpu", gpus=1)
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


class Net(nn.Module):
    """Two convolutions, what images go through between them, and an image that is learned. -> the loss and the image"""

    def __init__(self, between: nn.Module, **second: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.between = between
        self.second = nn.Conv2d(8, 8, 3, padding=1, **second)
        self.added = nn.Parameter(torch.randn(1, 8, 6, 6))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x: [batch, 3, 6, 6]."""
        image = self.second(self.between(self.first(x))) + self.added
        return {"loss": image.square().mean(), "image": image}


class Turned(nn.Module):
    """Looks at images as rows of numbers, one after the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, channels, height, width]."""
        return x.flatten(2).cumsum(2).view(x.shape)


class Orders(TorchDispatchMode):
    """Notes of each image that a convolution takes whether its channels are innermost."""

    def __init__(self) -> None:
        super().__init__()
        self.innermost: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        images = {aten.convolution.default: args[:1], aten.convolution_backward.default: args[:2]}.get(func, ())
        self.innermost += [image.is_contiguous(memory_format=torch.channels_last) for image in images]
        return func(*args, **(kwargs or {}))


def trained(model: nn.Module, x: torch.Tensor) -> list[bool]:
    """One step of the program beside one of the model; whether the images that its convolutions took were innermost."""
    program = autopar.compile(copy.deepcopy(model), CPU, example_inputs=((x,), {}))
    expected = model(x)
    expected["loss"].backward()
    with Orders() as orders:
        made = program(x)
        made["loss"].backward()
    torch.testing.assert_close(made["image"], expected["image"], rtol=1e-4, atol=1e-5)
    assert made["image"].stride() == expected["image"].stride()
    for name, param in model.named_parameters():
        gradient = program.get_parameter(name).grad
        assert gradient is not None and param.grad is not None
        torch.testing.assert_close(gradient, param.grad, rtol=1e-3, atol=1e-5)
        assert gradient.stride() == param.stride(), f"the fused optimizer takes {name} and its gradient as they lie"
    return orders.innermost


BETWEEN = {
    "norm and relu": lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "max pool": lambda: nn.MaxPool2d(3, 1, 1),
    "mean pool": lambda: nn.AvgPool2d(3, 1, 1),
}


@needs_onednn
@pytest.mark.parametrize("between", BETWEEN)
def test_convolutions_take_channels_innermost(between: str) -> None:
    torch.manual_seed(0)
    innermost = trained(Net(BETWEEN[between]()), torch.randn(4, 3, 6, 6))
    assert len(innermost) == 6 and all(innermost)  # two forward, two of each backward


@pytest.mark.parametrize(
    "case",
    ["looked at otherwise", "in groups", "float64"],
)
def test_other_convolutions_are_left(case: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    model = Net(Turned() if case == "looked at otherwise" else nn.ReLU(), groups=4 if case == "in groups" else 1)
    innermost = trained(*((model.double(), x.double()) if case == "float64" else (model, x)))
    assert len(innermost) == 6 and not all(innermost)


@needs_onednn
def test_a_tensor_of_one_pixel_has_no_order() -> None:
    torch.manual_seed(0)
    innermost = trained(Net(nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Sigmoid())), torch.randn(4, 3, 6, 6))
    assert len(innermost) == 6 and all(innermost)
