"""Whole tensors and their parts on the ranks of a mesh, and how far two tensors are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from autopar.placements import PARTIAL, State, is_dealt, runs_left, shard_dim


def relative_error(found: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> float:
    """Largest absolute difference over the largest absolute expected value, or over `floor` if that is larger.

    inf where shapes differ, or where one has an infinity or NaN that the other has not.
    """
    if found.shape != expected.shape:
        return float("inf")
    a, b = found.double(), expected.double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    difference = (a[finite] - b[finite]).abs().max().item()
    scale = max(b[finite].abs().max().item(), floor)
    return difference / scale if scale > 0 else difference


def gradient_errors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Relative error per gradient.

    Some gradients are zero but for rounding (a key's bias under softmax): none is measured against less than a
    thousandth of the largest gradient.
    """
    largest = max((t.abs().max().item() for t in expected.values() if t.numel()), default=0.0)
    return {name: relative_error(found[name], expected[name], 1e-3 * largest) for name in found}


def cut(tensor: torch.Tensor, state: State, mesh: tuple[int, ...], rank: int) -> torch.Tensor:
    """The part of a whole tensor that `rank` (row-major in the mesh) holds in `state`."""
    for axis, (placement, size, coordinate) in enumerate(zip(state, mesh, coordinates_of(rank, mesh), strict=True)):
        dim = shard_dim(placement)
        if dim is not None:
            runs = runs_left(placement, state[:axis], mesh[:axis])
            chunks = [coordinate] if not is_dealt(placement) else [coordinate, 2 * size - 1 - coordinate]
            found = [run.tensor_split(size * len(chunks), dim) for run in tensor.chunk(runs, dim)]
            tensor = torch.cat([run[chunk] for run in found for chunk in chunks], dim)
        elif placement == PARTIAL and coordinate:
            tensor = torch.zeros_like(tensor)
    return tensor.contiguous()


def glue(locals_: Sequence[torch.Tensor], state: State, mesh: tuple[int, ...]) -> torch.Tensor:
    """The whole tensor from every rank's part, innermost axis first."""
    parts = list(locals_)
    for axis, (placement, size) in reversed(list(enumerate(zip(state, mesh, strict=True)))):
        groups = [parts[i : i + size] for i in range(0, len(parts), size)]
        dim = shard_dim(placement)
        if dim is not None:
            runs = runs_left(placement, state[:axis], mesh[:axis])
            parts = [torch.cat(_in_row(group, runs, dim, is_dealt(placement)), dim) for group in groups]
        elif placement == PARTIAL:
            parts = [torch.stack(group).sum(0) for group in groups]
        else:
            parts = [_same_on_all(group) for group in groups]
    return parts[0]


def _in_row(group: Sequence[torch.Tensor], runs: int, dim: int, dealt: bool) -> list[torch.Tensor]:
    """The pieces of a dim in order: of every run its parts, dealt ones as their first halves and the others back."""
    found = []
    for run in range(runs):
        parts = [part.chunk(runs, dim)[run] for part in group]
        found += parts if not dealt else [p.chunk(2, dim)[0] for p in parts]
        found += [p.chunk(2, dim)[1] for p in reversed(parts)] if dealt else []
    return found


def _same_on_all(group: Sequence[torch.Tensor]) -> torch.Tensor:
    """Replicas must agree; where they don't, the one that differs most from the first is shown (so it is noticed)."""
    if group[0].dtype == torch.bool or not group[0].is_floating_point():
        return next((t for t in group if not torch.equal(t, group[0])), group[0])
    return max(group, key=lambda t: relative_error(t, group[0]))


def coordinates_of(rank: int, mesh: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major coordinates of a rank."""
    found = []
    for size in reversed(mesh):
        found.append(rank % size)
        rank //= size
    return tuple(reversed(found))
