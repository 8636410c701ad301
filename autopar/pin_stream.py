"""What a pinned `sp` says of the ops: between tensor-parallel products, sequences are cut over the tensor ranks.

As Megatron-LM has it (Korthikanti et al. 2022, section 4.2.2): what has a vector for every token and comes of the
parameters, the residual stream with its norms, dropouts and sums, is held in parts. A product takes all tokens, which
are gathered for it, and what the ranks of a tensor axis have made are summands, which are summed and scattered in one:
instead of a sum that leaves everything everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from autopar.cost.compute import OpClass, op_class
from autopar.dataflow import resolve, result_metas
from autopar.errors import PinError
from autopar.placements import REPLICATE, State
from autopar.rules import operands
from autopar.sharding import OpOption
from autopar.trace import Trace


@dataclass(frozen=True)
class Stream:
    """names: of the ops that make something of parameters for every token, products excepted. axes: of tensor ranks.
    lead: batch and sequence of the model's input."""

    names: frozenset[str]
    axes: tuple[int, ...]
    lead: tuple[int, ...]

    @staticmethod
    def of(trace: Trace, roles: Sequence[str | None], mesh: Sequence[int], lead: tuple[int, ...]) -> Stream:
        """On a mesh whose axes have these roles; PinError where sequences cannot be cut so."""
        of_params, found = {p.node for p in trace.params}, set()
        for node in trace.graph_module.graph.nodes:
            if node.op != "call_function" or not any(source.name in of_params for source in node.all_input_nodes):
                continue
            of_params.add(node.name)
            if op_class(node.target) is not OpClass.MATMUL and any(_is_stream(t, lead) for t in _tensors(node)):
                found.add(node.name)
        axes = tuple(axis for axis, role in enumerate(roles) if role == "tp")
        if found and axes:
            _check(lead[1], math.prod(n for n, role in zip(mesh, roles, strict=True) if role in ("cp", "tp")))
        return Stream(frozenset(found), axes, lead)

    def is_held_whole(self, node: fx.Node, option: OpOption) -> bool:
        """Whether every rank of a tensor axis takes or makes the whole of what has a vector for every token."""
        if node.name not in self.names:
            return False
        taken = [(resolve(o).tensor, s) for o, s in zip(operands(node), option.operand_states, strict=True)]
        made = [(t, s) for t, s in zip(result_metas(node), option.result_states, strict=True) if t is not None and s]
        return any(_is_stream(tensor, self.lead) and self._whole(state) for tensor, state in (*taken, *made))

    def is_gathered(self, node: fx.Node, state: State) -> bool:
        """Whether a copy of a result in this state is one that was gathered for a product: it does not wait for the
        backward pass, which gathers it again."""
        return node.name in self.names and self._whole(state)

    def _whole(self, state: State) -> bool:
        return any(state[axis] == REPLICATE for axis in self.axes)


def _check(tokens: int, parts: int) -> None:
    if tokens % parts:
        raise PinError(
            f"pin sp=True: {tokens} tokens do not divide by the {parts} tensor (and context) ranks that share a "
            "sequence; change tp or the sequence, or pin sp=False"
        )


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    taken = [o.meta["val"] for o in operands(node)]
    return [t for t in (*taken, *result_metas(node)) if isinstance(t, torch.Tensor)]


def _is_stream(tensor: torch.Tensor, lead: tuple[int, ...]) -> bool:
    return tensor.dim() > 2 and tensor.is_floating_point() and tuple(tensor.shape[:2]) == lead
