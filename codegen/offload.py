"""Activations that wait for the backward pass on the host: two ops, a copy there and a copy back.

On a GPU the copy goes to page-locked memory, in the order of the stream: the memory of the original is free for what
comes next, and nothing waits on the host. Tensors that are on the host already (a program that is verified, or run by
simulated ranks) are copied, so that what is counted and what is compared is the same program.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from autopar.codegen.builder import GraphBuilder
from autopar.codegen.storages import last_uses, storages


@torch.library.custom_op("autopar::offload", mutates_args=())
def offload_op(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory."""
    pinned = tensor.device.type == "cuda"
    host = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    return host.copy_(tensor, non_blocking=pinned)


@torch.library.custom_op("autopar::fetch", mutates_args=())
def fetch_op(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy in the device's memory."""
    made = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)
    return made.copy_(host, non_blocking=True)


@offload_op.register_fake
def _(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


@fetch_op.register_fake
def _(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=device)


_OFFLOAD, _FETCH = torch.ops.autopar.offload.default, torch.ops.autopar.fetch.default


def offload(builder: GraphBuilder, original: fx.Node) -> fx.Node:
    """The copy on the host, made at the end of the graph so far; see `place_last`."""
    return builder.call(_OFFLOAD, original)


def fetch(builder: GraphBuilder, host: fx.Node, device: torch.device) -> fx.Node:
    """The copy back on the device, made here: right before its first use."""
    return builder.call(_FETCH, host, device)


def is_on_host(node: fx.Node) -> bool:
    """Whether a node's result lies in the memory of the host."""
    return node.target is _OFFLOAD


def place_last(graph: fx.Graph, copies: Iterable[fx.Node]) -> None:
    """Move copies to the host up to right behind the last other use of what they copy."""
    copies = list(copies)
    if not copies:
        return
    order = [n for n in graph.nodes if n not in set(copies)]
    last = last_uses(order)
    for copy in copies:
        (storage,) = storages(copy.all_input_nodes)
        order[max(last[storage], _after_inputs(order))].append(copy)


def _after_inputs(order: list[fx.Node]) -> int:
    return max((i for i, node in enumerate(order) if node.op == "placeholder"), default=0)
