"""Which storages the nodes of an emitted graph refer to, and until when."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from autopar.codegen.builder import c10d, is_collective


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in _tensors(item)]
    return []


def storages(nodes: Iterable[fx.Node]) -> dict[int, int]:
    """Bytes by storage, of all tensors that the nodes make."""
    found = {}
    for node in nodes:
        found.update(storages_of(node.meta.get("val")))
    return found


def storages_of(value: object) -> dict[int, int]:
    """Bytes by storage, of the tensors in a node's fake result."""
    found = {}
    for tensor in _tensors(value):
        storage = tensor.untyped_storage()
        found[StorageWeakRef(storage).cdata] = storage.nbytes()
    return found


def last_uses(order: list[fx.Node]) -> dict[int, int]:
    """Per storage, the time of the last node that still needs a variable of it."""
    times = {node: time for time, node in enumerate(order)}
    last: dict[int, int] = {}
    for node in order:
        end = max([times[node], *(times[u] for u in node.users if u in times)])
        for storage in storages([node]):
            last[storage] = max(last.get(storage, 0), end)
        if is_collective(node):
            waited = max((times[u] for u in waits_of(node)), default=times[node])
            for storage in storages(node.all_input_nodes):
                last[storage] = max(last.get(storage, 0), waited)
    return last


def waits_of(start: fx.Node) -> list[fx.Node]:
    """The waits for a collective."""
    users = [u for user in start.users for u in ([user, *user.users])]
    return [u for u in users if u.target is c10d.wait_tensor.default]
