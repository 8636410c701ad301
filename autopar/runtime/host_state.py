"""The optimizer's state on the host between its steps, as plans with `offload=optimizer` price it.

The optimizer is an ordinary one that the user made of the program's parameters. Its step is taken part by part: the
state of one block comes to the device, the block's parameters are updated, and the state goes back before the next
block's comes. Whatever an optimizer does parameter by parameter is the same then.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from autopar._torch_compat import dtensor_maker, local_detached
from autopar.segments import block_of

Param = torch.nn.Parameter


class HostState:
    """Of all optimizers of one program's parameters.

    parts: the parameters whose state is on the device together. A step with a closure takes all of it at once.
    """

    def __init__(self, parts: Iterable[Iterable[Param]]) -> None:
        self.part_of = {id(param): at for at, part in enumerate(parts) for param in part}
        self._gradients: dict[Param, torch.Tensor] = {}
        self._at_work = False

    @staticmethod
    def of(params: Mapping[str, Param]) -> HostState:
        """Block by block; a parameter outside of the repeated blocks is a part of its own."""
        parts: dict[str, list[Param]] = {}
        for name, param in params.items():
            parts.setdefault(block_of(name) or name, []).append(param)
        return HostState(parts.values())

    def watch(self, owner: object) -> None:
        """Take part in every step of an optimizer of these parameters, as long as `owner` lives."""
        known = weakref.ref(self)

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = known()
            if state is not None:
                state.before_step(optimizer, args, kwargs)

        def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = known()
            if state is not None:
                state.after_step(optimizer)

        for handle in (register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)):
            weakref.finalize(owner, handle.remove)

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Update all parts but the last; the step that follows finds the gradients of that one only."""
        mine = self._mine(optimizer)
        if self._at_work or not mine:
            return
        if any(callable(one) for one in (*args, *kwargs.values())):
            self._fetch(optimizer, mine)
            return
        gradients = {p: p.grad for p in mine if p.grad is not None}
        parts: dict[int, list[Param]] = {}
        for param in gradients:
            parts.setdefault(self.part_of[id(param)], []).append(param)
            param.grad = None
        others = {p: p.grad for p in _params(optimizer) if p.grad is not None}
        *first, last = list(parts.values()) or [[]]
        self._at_work = True
        try:
            for param in others:
                param.grad = None
            for part in first:
                self._show(optimizer, part, gradients)
                type(optimizer).step(optimizer)
                self._send(optimizer, part)
                for param in part:
                    param.grad = None
        except BaseException:
            for param, gradient in gradients.items():
                param.grad = gradient
            raise
        finally:
            self._at_work = False
            for param, gradient in others.items():
                param.grad = gradient
        self._gradients = gradients
        self._show(optimizer, last, gradients)

    def after_step(self, optimizer: Optimizer) -> None:
        """Give the gradients back, and send to the host what is still on the device."""
        mine = self._mine(optimizer)
        if self._at_work or not mine:
            return
        for param, gradient in self._gradients.items():
            param.grad = gradient
        self._gradients = {}
        self._send(optimizer, mine)
        if any(param.is_cuda for param in mine):
            torch.cuda.synchronize()  # what is on the host may be read now, as by a checkpoint

    def _mine(self, optimizer: Optimizer) -> list[Param]:
        return [param for param in _params(optimizer) if id(param) in self.part_of]

    def _show(self, optimizer: Optimizer, part: list[Param], gradients: Mapping[Param, torch.Tensor]) -> None:
        self._fetch(optimizer, part)
        for param in part:
            param.grad = gradients[param]

    def _fetch(self, optimizer: Optimizer, params: Iterable[Param]) -> None:
        for param in params:
            _move(optimizer.state.get(param, {}), local_detached(param).device)

    def _send(self, optimizer: Optimizer, params: Iterable[Param]) -> None:
        for param in params:
            _move(optimizer.state.get(param, {}), torch.device("cpu"))


def _move(state: dict[str, Any], to: torch.device) -> None:
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() and local_detached(value).device != to:
            state[key] = _with_local(value, _copy(local_detached(value), to))


def _params(optimizer: Optimizer) -> list[Param]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _with_local(value: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    return dtensor_maker(value)(local) if isinstance(value, DTensor) else local


def _copy(local: torch.Tensor, to: torch.device) -> torch.Tensor:
    """To the host into pinned memory, which is copied faster both ways."""
    if to.type != "cpu":
        return local.to(to, non_blocking=True)
    made = torch.empty_like(local, device=to, pin_memory=local.device.type == "cuda")
    return made.copy_(local, non_blocking=True)
