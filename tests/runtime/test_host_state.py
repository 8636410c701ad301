"""Steps of an optimizer whose state waits on the host: the same numbers, one part on the device at a time."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autopar.runtime.host_state import HostState

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x).square().mean()


def pair() -> tuple[Net, Net]:
    torch.manual_seed(0)
    net = Net()
    return net, copy.deepcopy(net)


def steps(net: Net, optimizer: torch.optim.Optimizer, count: int = 3, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(5, 4, generator=generator).to(device)).backward()
        before = [p.grad for p in net.parameters()]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_numbers(name: str) -> None:
    plain, watched = pair()
    state = HostState.of(dict(watched.named_parameters()))
    state.watch(watched)
    made = OPTIMIZERS[name](watched.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(made, 1)
    steps(watched, made)
    other = OPTIMIZERS[name](plain.parameters())
    steps(plain, other)
    assert scheduler.last_epoch == 0
    for (fqn, a), b in zip(plain.named_parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=fqn)


def test_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the host were another device: what is fetched and sent, in order."""
    _, net = pair()
    names = {id(p): name for name, p in net.named_parameters()}
    state = HostState.of(dict(net.named_parameters()))
    state.watch(net)
    made = OPTIMIZERS["adamw"](net.parameters())
    steps(net, made, 1)
    moves: list[tuple[str, list[str]]] = []

    def recorded(word: str, real: Callable[..., None]) -> Callable[..., None]:
        def move(self: HostState, optimizer: Any, params: list[nn.Parameter]) -> None:
            moves.append((word, sorted(names[id(p)] for p in params)))
            real(self, optimizer, params)

        return move

    monkeypatch.setattr(HostState, "_fetch", recorded("fetch", HostState._fetch))
    monkeypatch.setattr(HostState, "_send", recorded("send", HostState._send))
    steps(net, made, 1)
    blocks = [[f"layers.{i}.bias", f"layers.{i}.weight"] for i in range(3)]
    parts = [*blocks, ["head.weight"], ["head.bias"]]
    assert moves[:-1] == [(word, part) for part in parts for word in ("fetch", "send")][:-1]
    assert moves[-1] == ("send", sorted(names.values()))


def test_others_and_closures_and_failures() -> None:
    _, net = pair()
    loose = nn.Parameter(torch.ones(3))
    state = HostState.of(dict(net.named_parameters()))
    state.watch(net)
    made = torch.optim.SGD([*net.parameters(), loose], lr=1.0)
    loose.grad = torch.ones(3)
    net(torch.ones(2, 4)).backward()
    made.step()
    assert torch.equal(loose, torch.zeros(3))  # once
    made.step(lambda: net(torch.ones(2, 4)))
    assert all(p.grad is not None for p in (*net.parameters(), loose))
    broken = torch.optim.AdamW(net.parameters(), lr=0.1)
    broken.param_groups[0]["lr"] = "fast"
    with pytest.raises(Exception, match=r"."):
        broken.step()
    assert all(p.grad is not None for p in net.parameters())


def test_it_ends_with_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    net, owner = pair()
    state, seen = HostState.of(dict(net.named_parameters())), []
    state.watch(owner)
    monkeypatch.setattr(HostState, "before_step", lambda self, *_: seen.append(self))
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert seen == [state]
    del owner
    gc.collect()
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    assert seen == [state]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_state_is_on_the_host_between_steps() -> None:
    plain, watched = (net.cuda() for net in pair())
    state = HostState.of(dict(watched.named_parameters()))
    state.watch(watched)
    made, other = OPTIMIZERS["adamw"](watched.parameters()), OPTIMIZERS["adamw"](plain.parameters())
    steps(watched, made, device="cuda")
    steps(plain, other, device="cuda")
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert all(not v.is_cuda for s in made.state.values() for v in s.values() if isinstance(v, torch.Tensor))
