"""What the simulator is told: how long every pass takes, in pieces, and what a stage holds. Seconds and bytes.

All ranks of a pipeline stage are alike, so a stage is one rank class. Each has these lanes; what shares a lane runs one
after the other, in the order in which it was issued, and lanes run beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COMPUTE = "compute"
TENSOR = "tensor axis"
CONTEXT = "context axis"
EXPERT = "expert axis"
DATA = "data axis"
PIPELINE = "pipeline axis"
HOST_LINK = "host link"
DISK = "disk"
HOST = "host"
LANES = (COMPUTE, TENSOR, CONTEXT, EXPERT, DATA, PIPELINE, HOST_LINK, DISK, HOST)


@dataclass(frozen=True)
class Piece:
    """A part of the model in one pass: before the blocks, one block, or after them.

    compute_s: its kernels. messages: (lane, seconds) of the messages that its kernels wait for, after them.
    gather_s: of its parameters, on the data axis, before it; they are asked for when the piece before begins.
    scatter_s: of its gradients, on the data axis, after it; nobody waits for it before the optimizer.
    """

    name: str
    compute_s: float
    messages: tuple[tuple[str, float], ...] = ()
    gather_s: float = 0.0
    scatter_s: float = 0.0


@dataclass(frozen=True)
class PassCost:
    """One micro-batch's way through one chunk. host_s: to launch it; the pass ends no earlier than that."""

    pieces: tuple[Piece, ...]
    host_s: float = 0.0

    @property
    def seconds(self) -> float:
        """From start to end, if nothing on the data axis is in the way."""
        device_s = sum(piece.compute_s + sum(s for _, s in piece.messages) for piece in self.pieces)
        return max(device_s, self.host_s)


@dataclass(frozen=True)
class ChunkCost:
    """A stretch of layers that runs at once. passes: by kind of action (`autopar.simulating.schedules`).

    kept_bytes: of one micro-batch, from the start of the forward pass to the end of the last backward one.
    """

    passes: Mapping[str, PassCost]
    kept_bytes: float = 0.0


@dataclass(frozen=True)
class Reduction:
    """A message with gradients on the data axis. after: (chunk, piece) of the last micro-batch's last backward pass
    that must have ended; None: all passes."""

    seconds: float
    after: tuple[int, int] | None = None


@dataclass(frozen=True)
class StageCost:
    """One stage: its chunks, and the end of a step.

    tied_s: exchange of gradients between the first and the last stage. returned_s: messages on the data axis that
    bring updated parameters back. state_copy_s: the optimizer's state from the host, and as long back. states_bytes:
    what it holds all the time. temporaries_bytes: beyond that and what is kept, while a pass runs.
    """

    chunks: tuple[ChunkCost, ...]
    reductions: tuple[Reduction, ...] = ()
    tied_s: float = 0.0
    optimizer_s: float = 0.0
    state_copy_s: float = 0.0
    returned_s: tuple[float, ...] = ()
    states_bytes: float = 0.0
    temporaries_bytes: float = 0.0


@dataclass(frozen=True)
class StepCost:
    """One training step. send_s: one micro-batch's activations, or their gradient, to a neighbour. unpack_s: what the
    receiver's tensor axis does with it. ranks: on each stage."""

    stages: tuple[StageCost, ...]
    micro_batches: int
    schedule: str
    send_s: float = 0.0
    unpack_s: float = 0.0
    ranks: int = 1
