"""Do the collectives of all ranks match, in order? Checked on the graphs, without running them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from autopar.codegen.builder import GROUP_PREFIX, is_collective, is_exchange
from autopar.codegen.emit import EmittedProgram
from autopar.compare import coordinates_of
from autopar.errors import VerifyError


def match_collectives(programs: Sequence[EmittedProgram], mesh: tuple[int, ...]) -> int:
    """Check that all ranks issue matching collectives in matching order; returns how many each rank issues."""
    return match_graphs([(p.forward, p.backward) for p in programs], mesh)


def match_graphs(programs: Sequence[Sequence[fx.Graph]], mesh: tuple[int, ...]) -> int:
    """The same for the graphs that each rank runs, in order.

    Every group's members must list the same collectives (kind, shape, dtype) for that group, and playing
    all lists together must not stop before their ends.
    """
    lists = [_collectives(p, rank, mesh) for rank, p in enumerate(programs)]
    position = [0] * len(lists)
    while any(position[r] < len(lists[r]) for r in range(len(lists))):
        progress = False
        for rank in range(len(lists)):
            if position[rank] >= len(lists[rank]):
                continue
            group, call, node = lists[rank][position[rank]]
            waiting = [r for r in group if position[r] < len(lists[r]) and lists[r][position[r]][0] == group]
            if len(waiting) < len(group):
                continue
            for other in group:
                theirs = lists[other][position[other]]
                if theirs[1] != call:
                    raise VerifyError(
                        f"collectives don't match: rank {rank} issues {call} at {node}, rank {other} {theirs[1]} "
                        f"at {theirs[2]}",
                        node=node,
                    )
            for other in group:
                position[other] += 1
            progress = True
        if not progress:
            rank = next(r for r in range(len(lists)) if position[r] < len(lists[r]))
            group, call, node = lists[rank][position[rank]]
            raise VerifyError(f"deadlock: rank {rank} waits in {call} at {node} for ranks {group}", node=node)
    return len(lists[0])


def _collectives(
    program: Sequence[fx.Graph], rank: int, mesh: tuple[int, ...]
) -> list[tuple[tuple[int, ...], str, str]]:
    """(members of the group, call, node) of each collective of one rank, in order."""
    found = []
    for graph in program:
        for node in graph.nodes:
            if is_collective(node) or is_exchange(node):
                if is_collective(node):
                    _check_waited(node)
                token = next(a for a in node.args if isinstance(a, str) and a.startswith(GROUP_PREFIX))
                members = _members(rank, int(token.removeprefix(GROUP_PREFIX)), mesh)
                tensors = [i.meta["val"] for i in node.all_input_nodes if isinstance(i.meta["val"], torch.Tensor)]
                shapes = [(tuple(t.shape), str(t.dtype)) for t in tensors]
                rest = [a for a in node.args[1:] if a != token and not isinstance(a, fx.Node)]
                found.append((members, f"{node.target}({shapes}, {rest})", str(node.meta.get("origin", node.name))))
    return found


def _check_waited(start: fx.Node) -> None:
    """The result of a collective may be used by its wait only: before that it holds anything."""
    users = [u for user in start.users for u in (user.users if user.target is operator.getitem else [user])]
    early = [u for u in users if u.target is not torch.ops._c10d_functional.wait_tensor.default]
    if early:
        what = str(early[0].meta.get("origin", early[0].name))
        raise VerifyError(f"{early[0].name} uses the result of {start.target} before it is waited for", what)


def _members(rank: int, axis: int, mesh: tuple[int, ...]) -> tuple[int, ...]:
    stride = 1
    for size in mesh[axis + 1 :]:
        stride *= size
    first = rank - coordinates_of(rank, mesh)[axis] * stride
    return tuple(first + i * stride for i in range(mesh[axis]))
