"""What the optimizer keeps and what its step costs."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.cost.dtypes import FLOATING
from autopar.errors import AutoparError
from autopar.hardware import DeviceSpec

# States in the parameter's own dtype, per parameter, as torch.optim keeps them. Adam's step
# counter (one float32 a tensor) is left out.
_STATES = {"adamw": 2, "adam": 2, "sgd-momentum": 1, "sgd": 0, "none": 0}
OPTIMIZER = "optimizer"  # the name of its measured curve


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer by name: "adamw", "adam", "sgd-momentum", "sgd", or "none" (no step); AutoparError otherwise."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in _STATES:
            raise AutoparError(f"unknown optimizer {self.name!r}; use one of {', '.join(_STATES)}")

    @property
    def states_per_param(self) -> int:
        """Numbers kept per number of a parameter."""
        return _STATES[self.name]

    @property
    def updates(self) -> bool:
        """Whether there is a step to pay for."""
        return self.name != "none"

    def state_bytes_per_param(self, dtype: str) -> int:
        """Bytes of state per number of a parameter of this dtype ("float32")."""
        if dtype not in FLOATING:
            raise AutoparError(f"no optimizer state for parameters of dtype {dtype}; use one of {', '.join(FLOATING)}")
        return self.states_per_param * FLOATING[dtype]

    def state_bytes(self, param_bytes: int) -> int:
        """Bytes of state of `param_bytes` of parameters."""
        return self.states_per_param * param_bytes


def optimizer_time_s(device: DeviceSpec, param_bytes_local: float, state_bytes_local: float) -> float:
    """Seconds to update one parameter's shard; 0 without bytes.

    Bound by memory: parameter, gradient and states are read, parameter and states are
    written, once each (as a fused step does). A device that was measured has a curve by
    these bytes.
    """
    if param_bytes_local < 0 or state_bytes_local < 0:
        raise ValueError(f"bytes of parameter and state are {param_bytes_local}, {state_bytes_local}; none may be < 0")
    moved = 3 * param_bytes_local + 2 * state_bytes_local
    if moved == 0:
        return 0.0
    curve = device.measured.curve((OPTIMIZER,), ("float32",))
    if curve is not None:
        return device.parameter_overhead_s + curve.seconds(moved)
    streaming_s = moved / (device.memory_bytes_per_s * device.memory_efficiency_fraction)
    return device.parameter_overhead_s + device.launch_overhead_s + streaming_s
