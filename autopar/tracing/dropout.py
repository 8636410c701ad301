"""Dropout in two ops: one draws the mask, one applies it.

`native_dropout` does both, so that what comes out of it could never be computed again: that
would draw another mask. Here only the mask comes from the random op; the result is made by
`native_dropout_backward`, which multiplies by mask and scale and is what the CPU kernel of
`native_dropout` does, bit for bit. So the backward pass may keep the mask, a byte an
element, and run the multiplication again.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

aten = torch.ops.aten


def split_dropout(graph: fx.Graph) -> None:
    """Rewrite every dropout that draws numbers, in place."""
    for node in list(graph.find_nodes(op="call_function", target=aten.native_dropout.default)):
        source, probability, train = node.args
        results = [n for n in node.users if n.target is operator.getitem and n.args[1] == 0]
        if train is False or not 0 < float(probability) < 1 or not results:
            continue
        masks = [n for n in node.users if n.target is operator.getitem and n.args[1] == 1]
        with graph.inserting_after(node):
            mask = graph.call_function(operator.getitem, (node, 1))
        mask.meta = {**node.meta, "val": node.meta["val"][1]}
        with graph.inserting_after(mask):
            scale = 1 / (1 - float(probability))
            target = aten.native_dropout_backward.default
            result = graph.create_node("call_function", target, (source, mask, scale), name="dropped")
        result.meta = {**node.meta, "val": node.meta["val"][0]}
        for old, new in [*((m, mask) for m in masks), *((r, result) for r in results)]:
            old.replace_all_uses_with(new)
            graph.erase_node(old)
