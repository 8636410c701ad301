"""What a cluster is made of: one device, one level of links. Frozen values, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

from autopar.cost.checks import (
    AtLeastOne,
    Bytes,
    Count,
    Fraction,
    Name,
    NonNegative,
    OptionalCount,
    OptionalNonNegative,
    Positive,
    checked,
    read_object,
    shown,
)
from autopar.curves import MAX_CURVES, NOTHING_MEASURED, CollectiveCurve, DeviceCurves, once
from autopar.errors import ClusterSpecError

DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
KINDS = ("cuda", "cpu")


@dataclass(frozen=True)
class DeviceSpec:
    """One device.

    peak_flops_per_s: (dtype, dense FLOP/s) pairs, sorted; a mapping is accepted. "tf32" is
        what float32 matmuls reach where TF32 is switched on.
    reserved_bytes: of memory_bytes, what a program cannot have (context, communication
        buffers, allocator).
    *_efficiency_fraction: share of the peak rate that large kernels of this class reach, for as long as a step lasts.
    matmul_ramp_s: time constant of the rise to that efficiency, see `autopar.cost.compute`.
    launch_overhead_s: what every op costs however small.
    view_overhead_s: what a view (a transpose, a slice) costs; nothing where views are made ahead of the device.
    parameter_overhead_s: what a step spends on each trained parameter around its ops (binding it, handing over its
        gradient).
    measured: curves of `autopar profile`; where there is one, it goes before the rates above.

    What `autopar.cost.gemm` knows of matrix products by shape:

    multiprocessors: of the device; 0 where unknown, then products go by FLOPs alone.
    matmul_burst_fraction: share of the peak rate inside the main loop of the best tile, before power or heat bind.
    matmul_start_s: of a kernel that multiplies, from its start to its first full tile and from the last to its end.
    matmul_wave_s: what each wave of tiles takes beyond its FLOPs: filling the pipeline, writing the results.

    Attention by passes (`autopar.cost.compute`), 0 where unknown, then both go by attention_efficiency_fraction:

    attention_forward_fraction, attention_backward_fraction: share of the peak rate in the main loop at head width 128.

    What the host spends, see `autopar.cost.host`:

    host_op_s: eager PyTorch, one op of the forward pass: Python, dispatch, the record for autograd, the launch.
    host_backward_op_s: one op of the backward pass, which the autograd engine runs in C++.
    host_optimizer_op_s: one kernel of an optimizer's step over lists of tensors ("foreach", "fused").
    host_view_s: one view (a transpose, a slice) of the forward pass, which launches nothing.
    host_compiled_op_s: one kernel that torch.compile's code calls.
    host_replay_s: one kernel of a CUDA graph.
    kernel_gap_s: on the device, between the end of a kernel and the start of the next in a stream that is never empty.

    step_fraction: of the rates at which kernels run one by one, what is left in training steps that go on for hours
        (power, heat, several kernels at once).

    host_link_bytes_per_s: what a large copy between the device and page-locked memory of its host reaches, either way,
        while all devices of the node copy; 0 where no such link is known, then nothing is offloaded.
    price_per_hour_usd: of one device with its share of node and network; None where unknown.
    """

    name: Name
    kind: Name
    memory_bytes: Count
    reserved_bytes: Bytes
    memory_bytes_per_s: Positive
    memory_efficiency_fraction: Fraction
    peak_flops_per_s: tuple[tuple[str, float], ...]
    matmul_efficiency_fraction: Fraction
    matmul_ramp_s: NonNegative
    attention_efficiency_fraction: Fraction
    launch_overhead_s: NonNegative
    view_overhead_s: NonNegative = 0.0
    parameter_overhead_s: NonNegative = 0.0
    measured: DeviceCurves = NOTHING_MEASURED
    multiprocessors: Bytes = 0
    matmul_burst_fraction: Fraction = 1.0
    matmul_start_s: NonNegative = 0.0
    matmul_wave_s: NonNegative = 0.0
    attention_forward_fraction: NonNegative = 0.0
    attention_backward_fraction: NonNegative = 0.0
    host_op_s: NonNegative = 0.0
    host_backward_op_s: NonNegative = 0.0
    host_optimizer_op_s: NonNegative = 0.0
    host_view_s: NonNegative = 0.0
    host_compiled_op_s: NonNegative = 0.0
    host_replay_s: NonNegative = 0.0
    kernel_gap_s: NonNegative = 0.0
    step_fraction: Fraction = 1.0
    price_per_hour_usd: OptionalNonNegative = None
    host_link_bytes_per_s: NonNegative = 0.0

    def __post_init__(self) -> None:
        checked(self, "device")
        if not isinstance(self.measured, DeviceCurves):
            raise ClusterSpecError(f"device.measured is a {type(self.measured).__name__}; use DeviceCurves")
        if self.kind not in KINDS:
            raise ClusterSpecError(f"device.kind is {self.kind!r}; use one of {', '.join(KINDS)}")
        if self.reserved_bytes >= self.memory_bytes:
            raise ClusterSpecError(
                f"device.reserved_bytes ({self.reserved_bytes}) must be less than device.memory_bytes "
                f"({self.memory_bytes}); lower it"
            )
        rates = read_object(self.peak_flops_per_s, DTYPES, "device.peak_flops_per_s", "positive")
        object.__setattr__(self, "peak_flops_per_s", tuple(sorted(rates.items())))

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    def __hash__(self) -> int:
        """Computed once: devices are keys of caches that are asked thousands of times."""
        return self._hash

    @property
    def usable_bytes(self) -> int:
        """Memory that a program can have."""
        return self.memory_bytes - self.reserved_bytes

    def peak_flops(self, dtype: str) -> float:
        """Dense peak in FLOP/s for a torch dtype name without "torch."; ClusterSpecError if the device has none.

        Complex types go by their real type. Integers have no matrix units in torch and go
        by the device's slowest rate.
        """
        rates = dict(self.peak_flops_per_s)
        real = {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)
        if real in rates:
            return rates[real]
        if real.removeprefix("u").startswith("int") or real == "bool":
            return min(rates.values())
        raise ClusterSpecError(
            f"device {self.name!r} has no rate for {dtype}; it has {', '.join(rates)}: use one of these as "
            "precision, or add the rate to device.peak_flops_per_s"
        )


@dataclass(frozen=True)
class LinkSpec:
    """One level of the network: what joins the units of the level below (devices, then nodes, then racks).

    bytes_per_s: per device, one direction, as the maker states it. Adapters that devices share are divided among them.
    efficiency_fraction: share of it that large collectives reach.
    latency_s: of one hop, software included.
    measured: collectives as `autopar profile` found them; where there is one, it goes before the figures above.
    devices: how many devices one unit of this level joins; None for those of a node (first level), all (last level).
    oversubscription: how many times more the devices below can send than this level can carry, if all send at once.
    rails: adapters of a node on this level; None for one per device. A device can use all of one adapter, if the others
        that share it have nothing to send.
    reduces: whether its switches add up what passes (NVLS, SHARP), so that an all-reduce crosses it once each way.
    """

    name: Name
    bytes_per_s: Positive
    efficiency_fraction: Fraction
    latency_s: NonNegative
    measured: tuple[CollectiveCurve, ...] = ()
    devices: OptionalCount = None
    oversubscription: AtLeastOne = 1.0
    rails: OptionalCount = None
    reduces: bool = False

    def __post_init__(self) -> None:
        checked(self, "link")
        if not isinstance(self.reduces, bool):
            raise ClusterSpecError(f"link.reduces is {shown(self.reduces)}; use true or false")
        object.__setattr__(self, "measured", tuple(self.measured))
        if len(self.measured) > MAX_CURVES or not all(isinstance(c, CollectiveCurve) for c in self.measured):
            raise ClusterSpecError(f"link.measured must hold at most {MAX_CURVES} CollectiveCurves")
        once(((c.kind, c.ranks) for c in self.measured), "link.measured")

    @property
    def reached_bytes_per_s(self) -> float:
        """What large collectives reach, per device, one direction, when all devices send at once."""
        return self.bytes_per_s * self.efficiency_fraction / self.oversubscription
