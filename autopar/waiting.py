"""How activations may wait for the backward pass: on the device, or, where a link is known, on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from autopar.cost.model import CostModel
from autopar.dataflow import is_backward, module_path
from autopar.errors import PinError
from autopar.placements import State
from autopar.solver import Value


class Waiting:
    """What one problem allows. pinned: what a person fixed for the results of an op, fleeting: for copies of them; see
    `autopar.sharding.Pins`."""

    def __init__(
        self,
        costs: CostModel,
        pinned: Callable[[fx.Node], str | None] | None,
        fleeting: Callable[[fx.Node, State], bool] | None = None,
    ) -> None:
        self.costs, self.pinned, self.fleeting = costs, pinned, fleeting
        self._known: dict[int, tuple[float, ...]] = {}

    def allowed(self, value: Value, node: fx.Node, states: tuple[State, ...]) -> Value:
        """The result of `node` with the seconds that it takes to the host and back, per state, if it may go there, and
        with the states in which copies of it are always made anew."""
        if self.fleeting is not None and not is_backward(node):
            value = replace(value, fleeting=frozenset(i for i, s in enumerate(states) if self.fleeting(node, s)))
        wanted = self.pinned(node) if self.pinned is not None else None
        if wanted == "offload" and self.costs.host_bytes is None:
            raise PinError(
                f"the pin 'offload' of {module_path(node)} needs a link to the host, and cluster "
                f"{self.costs.cluster.name!r} describes none; give device.host_link_bytes_per_s"
            )
        if is_backward(node) or self.costs.host_bytes is None or wanted in ("keep", "recompute"):
            return value
        sizes = value.state_bytes
        if id(sizes) not in self._known:  # identical layers share them
            self._known[id(sizes)] = tuple(self.costs.offload_s(n) for n in sizes)
        return replace(value, offload_s=self._known[id(sizes)], may_keep=wanted != "offload")
