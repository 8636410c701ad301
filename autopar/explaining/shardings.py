"""How tensors are cut: every distinct parameter, and every distinct value of the layers, as a rectangle in parts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from autopar.dataflow import is_backward, module_path, result_metas
from autopar.explaining.attribution import Attribution, folded, op_name
from autopar.placements import PARTIAL, State, shard_counts, shard_dim
from autopar.plans import Plan
from autopar.segments import block_of
from autopar.trace import Trace


@dataclass(frozen=True)
class Sharding:
    """Tensors that lie alike. what: "parameter" or "value" (of the forward pass of a layer).

    shape: None where only the plan file is at hand, which does not say it. nbytes: of one whole tensor.
    count: how many tensors there are.
    """

    name: str
    what: str
    state: State
    mesh: tuple[int, ...]
    shape: tuple[int, ...] | None = None
    nbytes: int | None = None
    count: int = 1

    def parts(self) -> list[int]:
        """Into how many parts each dim is cut; without a shape, of the dims that are."""
        cut = [dim for dim in map(shard_dim, self.state) if dim is not None]
        dims = len(self.shape) if self.shape is not None else max(cut, default=0) + 1
        return shard_counts(dims, self.state, self.mesh)

    def to_dict(self) -> dict[str, Any]:
        """As data. replicas: ranks that hold the same. summed: whether parts are summands of the tensor."""
        parts = self.parts()
        replicas = math.prod(n for p, n in zip(self.state, self.mesh, strict=True) if p == "R")
        return {
            "name": self.name,
            "what": self.what,
            "count": self.count,
            "shape": None if self.shape is None else list(self.shape),
            "bytes": self.nbytes,
            "placement": list(self.state),
            "parts": parts,
            "replicas": replicas,
            "summed": PARTIAL in self.state,
            "in_words": in_words(self.state, self.mesh),
        }


def in_words(state: State, mesh: Sequence[int]) -> str:
    """ "dim 0 in 4 parts on axis 0; whole on axis 1"."""
    if not state:
        return "whole"
    said = []
    for axis, (placement, size) in enumerate(zip(state, mesh, strict=True)):
        dim = shard_dim(placement)
        how = "summands" if placement == PARTIAL else "whole" if dim is None else f"dim {dim} in {size} parts"
        said.append(f"{how} on axis {axis}")
    return "; ".join(said)


def parameter_shardings(plan: Plan, trace: Trace | None) -> list[Sharding]:
    """Per pattern of names and stored placement, in the order of the model."""
    known = {p.fqn: p for p in trace.params} if trace is not None else {}
    groups: dict[tuple[str, State, tuple[int, ...] | None], list[str]] = defaultdict(list)
    for fqn, state in plan.decisions.params.items():
        shape = tuple(known[fqn].shape) if fqn in known else None
        groups[folded(fqn), state, shape].append(fqn)
    found = []
    for (name, state, shape), members in groups.items():
        nbytes = None if shape is None else math.prod(shape) * known[members[0]].dtype.itemsize
        found.append(Sharding(name, "parameter", state, plan.mesh, shape, nbytes, len(members)))
    return found


def value_shardings(attribution: Attribution) -> list[Sharding]:
    """What the forward ops make, in the order of the graph: of repeated layers once, of the rest not at all."""
    found: dict[tuple[Any, ...], _Seen] = {}
    for name, state, shape, nbytes in _values(attribution):
        seen = found.setdefault((name, state, shape), _Seen(nbytes))
        seen.count += 1
    mesh = attribution.costs.mesh
    return [Sharding(n, "value", s, mesh, shape, seen.nbytes, seen.count) for (n, s, shape), seen in found.items()]


@dataclass
class _Seen:
    nbytes: int
    count: int = field(default=0)


def _values(attribution: Attribution) -> Iterator[tuple[str, State, tuple[int, ...], int]]:
    layered = any(block_of(module_path(n)) for n in attribution.flow.ops)
    for node in attribution.flow.ops:
        path = module_path(node)
        if is_backward(node) or (layered and not block_of(path)):
            continue
        decided = attribution.decisions.nodes[node.name].result_states
        for tensor, state in zip(result_metas(node), decided, strict=True):
            if tensor is not None and state is not None and tensor.dim():
                name = f"{folded(path) or 'the model'}: {op_name(node)}"
                yield name, state, tuple(tensor.shape), tensor.numel() * tensor.dtype.itemsize
