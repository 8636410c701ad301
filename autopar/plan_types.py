"""The decisions of a plan, node by node: what the planner hands to the code generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from autopar.placements import Fold, Placement, State, is_dealt, shard_runs
from autopar.rules.types import AxisRule


@dataclass(frozen=True)
class NodeDecision:
    """How one op runs.

    rules: one per mesh axis.
    operand_states: the state in which the *base value* of each operand is taken.
    result_states: the state of each result (None for results that do not exist).
    recompute: whether the op runs again in the backward pass.
    """

    rules: tuple[AxisRule, ...]
    operand_states: tuple[State, ...]
    result_states: tuple[State | None, ...]
    recompute: bool = False


@dataclass(frozen=True)
class Decisions:
    """Everything the code generator needs to know about one joint graph.

    nodes: per real op (fx node name).
    outputs: for each output of the model and each buffer update (node name), the state in
        which its base value is handed over.
    params: the state in which each parameter (and its gradient) is stored, by fqn.
    kept: base values whose original is kept from forward to backward.
    kept_copies: (base value, state) of converted copies kept from forward to backward.
    offloaded: base values whose original waits for the backward pass on the host.
    """

    nodes: dict[str, NodeDecision]
    params: dict[str, State]
    outputs: dict[str, State]
    kept: frozenset[str]
    kept_copies: frozenset[tuple[str, State]]
    offloaded: frozenset[str] = frozenset()

    def fold(self, of: Fold | None) -> Fold | None:
        """The trace's fold, if anything is cut run by run or dealt out."""
        if of is None or not (self._folded or self.dealt):
            return None
        return replace(of, dealt=self.dealt)

    @cached_property
    def _folded(self) -> bool:
        return any(shard_runs(p) > 1 for p in self._placements())

    @cached_property
    def dealt(self) -> bool:
        """Whether anything is dealt out."""
        return any(map(is_dealt, self._placements()))

    def _placements(self) -> Iterator[Placement]:
        states = (s for d in self.nodes.values() for s in (*d.operand_states, *d.result_states) if s is not None)
        return (placement for state in states for placement in state)
