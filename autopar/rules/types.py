"""What is known about an op on one mesh axis, as data."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.placements import Placement


@dataclass(frozen=True)
class InnerCollective:
    """A collective that a lowering performs inside an op.

    It moves the local bytes of one tensor of the op after `reduced_dims` were reduced
    to size 1, `copies` times (tensors alike that travel together, or a part of one), and does so `times` times in a
    row. `tensor` is ("in", i) or ("out", i).
    beside_compute: it runs while the op computes on what has come already (see `autopar.opcost`).
    """

    kind: str  # a kind of autopar.cost.collectives, or "copy" for a pass over local memory
    tensor: tuple[str, int]
    reduced_dims: tuple[int, ...] = ()
    copies: float = 1
    times: int = 1
    beside_compute: bool = False


@dataclass(frozen=True)
class AxisRule:
    """One legal way to run an op on one mesh axis.

    `inputs` has a placement per tensor operand, in the order of `operands(node)`;
    `outputs` one per tensor result (None for results that do not exist).
    `lowering` names how the local computation is written: "local" runs the same op on
    the shards (its size arguments made local); others are functions of `codegen.lowerings`.
    `units`: where not 0, dims are cut between this many equal units only (the groups of a
    convolution), so that all axes with such a rule together must divide it.
    """

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement | None, ...]
    lowering: str = "local"
    collectives: tuple[InnerCollective, ...] = ()
    units: int = 0


@dataclass(frozen=True)
class RuleSet:
    """All the rules of one op. `known` is False where the op only runs replicated for want of a rule."""

    rules: tuple[AxisRule, ...]
    known: bool
