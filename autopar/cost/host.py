"""What the host spends to keep a device busy: a step is never faster than its Python, dispatch and launches.

Eager PyTorch issues one op after the other; the device runs behind it and waits if its kernels are shorter. Seconds of
a stretch without a synchronization are therefore max(host, device), where

    host, eager      forward ops x host_op_s + views x host_view_s + backward ops x host_backward_op_s
                     + kernels of the optimizer x host_optimizer_op_s
    host, compiled   kernels x host_compiled_op_s
    host, graphs     kernels x host_replay_s
    device           sum of its kernels + kernels x kernel_gap_s, the drain and the fill between two kernels

Where the figures of the presets come from

    host_op_s, host_view_s   gpt-fast's eager Llama 2 7B on A100 is bound by the host and takes 39.2 ms a token (25.5
                             tokens/s, PyTorch blog 2023). Its layer is about 50 kernels and 35 views, and 1.2 ms a
                             layer are 18 us a kernel and 3.75 us a view, less a sixth for sampling and the loop. Nodes
                             of H100 and later have cores that are 1.5 times faster (Sapphire Rapids for Rome): 12 and
                             2.5 us. Autograd's record (about 1 us) and the modules' Python are in these figures
    host_backward_op_s       the autograd engine runs in C++: dispatch, allocation and launch, no Python: 8 us
    host_optimizer_op_s      a kernel over a list of tensors reads the list first: 12 us
    host_compiled_op_s       generated code calls a kernel's launcher from Python: about the 4 us of a launch
    host_replay_s            a CUDA graph starts in 2.5 us and about 1 ns a kernel (NVIDIA developer blog, 2024)
    kernel_gap_s             kernels of 2.9 us follow each other after 3.8 us in a stream, 3.4 us in a graph (NVIDIA
                             developer blog, 2019)

None of these figures is known within better than a third: hosts differ. A device of unknown host (0) is never bound
by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.hardware import DeviceSpec

MODES = ("eager", "compiled", "graphs")


@dataclass(frozen=True)
class OpCounts:
    """What a host issues in some stretch of a step: ops that launch kernels, by pass, and views of the forward pass."""

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    views: float = 0.0

    @property
    def kernels(self) -> float:
        """All that the device runs."""
        return self.forward + self.backward + self.optimizer


def host_time_s(device: DeviceSpec, counts: OpCounts, mode: str = "eager") -> float:
    """Seconds of the host to issue these ops; mode: "eager", "compiled" (torch.compile) or "graphs" (CUDA graphs)."""
    if mode not in MODES:
        raise ValueError(f"unknown way to launch {mode!r}; use one of {', '.join(MODES)}")
    if mode == "compiled":
        return counts.kernels * device.host_compiled_op_s
    if mode == "graphs":
        return counts.kernels * device.host_replay_s
    return (
        counts.forward * device.host_op_s
        + counts.views * device.host_view_s
        + counts.backward * device.host_backward_op_s
        + counts.optimizer * device.host_optimizer_op_s
    )


def stretch_time_s(device: DeviceSpec, kernels_s: float, counts: OpCounts, mode: str = "eager") -> float:
    """Seconds of a stretch without a synchronization; kernels_s: of its kernels on the device, launches left out."""
    return max(host_time_s(device, counts, mode), kernels_s + counts.kernels * device.kernel_gap_s)
