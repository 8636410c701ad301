"""Computes gradients of weights beside collectives that the rest of the backward pass waits for.

A batch norm over all ranks, or a product cut along what it contracts, sums over the ranks in the middle of the
backward pass, and what comes next needs the sum. Gradients of weights are not needed next, by nobody but the
optimizer: they are put off until such a sum is on its way, so that ranks compute them instead of waiting for each
other. What is put off keeps its operands alive a little longer: `codegen/schedule.py` does without where that does
not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from autopar.codegen.builder import c10d, call_in, is_collective, is_exchange

aten = torch.ops.aten
_PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.convolution_backward.default,
)
_IMAGES, _WEIGHT, _BIAS = range(3)  # the gradients that convolution_backward makes


def compute_beside(graph: fx.Graph) -> bool:
    """Move gradients of weights behind the start of the next collective that compute waits for; whether any moved.

    For graphs that make new tensors only, whose collectives start and are waited for where they shall be.
    """
    leads_on = _leads_on(graph)
    starts = [n for n in graph.nodes if is_collective(n) and _holds_up(n, leads_on)]
    if not starts:
        return False
    _split_convolutions(graph)
    leads_on = _leads_on(graph)
    window: list[fx.Node] = []  # what runs since the one before was started
    moved = False
    for node in list(graph.nodes):
        if node in starts:
            moved |= _put_off(window, node, leads_on)
            window = []
        elif node.op == "call_function":
            window.append(node)
    graph.lint()
    return moved


def _leads_on(graph: fx.Graph) -> set[fx.Node]:
    """All nodes that a product follows from."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user in found or user.target in _PRODUCTS for user in node.users):
            found.add(node)
    return found


def _holds_up(start: fx.Node, leads_on: set[fx.Node]) -> bool:
    """Whether a product needs the result of a collective, and no product runs until it is waited for."""
    node = start.next
    while node.op == "call_function" and node.target not in _PRODUCTS:
        if node.target is c10d.wait_tensor.default:
            source = node.all_input_nodes[0]
            if start in (source, *source.all_input_nodes):
                return node in leads_on
        node = node.next
    return False


def _split_convolutions(graph: fx.Graph) -> None:
    """Make the gradients of a convolution's weight and bias an op of their own: torch's kernels compute them apart."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        *given, wanted = node.args
        mode = next(t for t in node.meta["val"] if t is not None).fake_mode
        if not wanted[_IMAGES] or not any(wanted[_WEIGHT:]):
            continue
        for mask in ([True, False, False], [False, *wanted[_WEIGHT:]]):
            with graph.inserting_before(node):
                part = call_in(graph, mode, node.target, *given, mask)
            part.meta["origin"] = node.meta.get("origin", node.name)
            for result in [user for user in node.users if mask[user.args[1]]]:
                part.append(result)
                result.args = (part, result.args[1])
                result.meta["val"] = part.meta["val"][result.args[1]]
        graph.erase_node(node)


def _put_off(window: Sequence[fx.Node], start: fx.Node, leads_on: set[fx.Node]) -> bool:
    """Move the gradients of weights in a window behind `start`, with what follows from them there."""
    needed, moving = _needed(window, start), set[fx.Node]()
    for node in window:
        if node.target in _PRODUCTS and node not in leads_on and node not in moving:
            group = _with_followers(window, node)
            if not group & needed and all(map(_may_move, group)):
                moving |= group
    anchor = start
    for node in window:
        if node in moving:
            anchor.append(node)
            anchor = node
    return bool(moving)


def _needed(window: Sequence[fx.Node], start: fx.Node) -> set[fx.Node]:
    """What a collective follows from."""
    found = set(start.all_input_nodes)
    for node in reversed(window):
        if node in found:
            found.update(node.all_input_nodes)
    return found


def _with_followers(window: Sequence[fx.Node], first: fx.Node) -> set[fx.Node]:
    """A node and all that follows from it in a window."""
    found = {first}
    for node in window:
        if any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found


def _may_move(node: fx.Node) -> bool:
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return node.target is not c10d.wait_tensor.default and not is_exchange(node) and not random
