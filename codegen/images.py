"""Images with their channels innermost, where convolutions run on a CPU.

oneDNN lays out every operand anew that comes as torch makes it, channel by channel, and its result back; images whose
channels are innermost in memory (`torch.channels_last`) it takes as they are. Shapes and numbers stay the same, only
strides differ: 13 % less time for the ResNet of `benchmarks/throughput.py` (float32, AMD EPYC, one thread). Graphs in
which an op looks at images otherwise than pixel by pixel or channel by channel are left as they are: a view would
become a copy there.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

aten = torch.ops.aten
_CONVOLUTIONS = {aten.convolution.default: (0,), aten.convolution_backward.default: (0, 1)}  # operands: images
_WEIGHT_GRADIENT = 1  # of the results of convolution_backward
# Ops, beside those on single elements, that give images with channels innermost what they are given so, by kernels
# that are no slower than for the usual order.
_ANY_ORDER = frozenset(
    {
        *_CONVOLUTIONS,
        operator.getitem,
        aten.native_batch_norm.default,
        aten.native_batch_norm_backward.default,
        aten._native_batch_norm_legit.default,
        aten._native_batch_norm_legit_no_training.default,
        aten._native_batch_norm_legit_functional.default,
        aten.max_pool2d_with_indices.default,
        aten.max_pool2d_with_indices_backward.default,
        aten.avg_pool2d.default,
        aten.avg_pool2d_backward.default,
        aten._adaptive_avg_pool2d.default,
        aten._adaptive_avg_pool2d_backward.default,
        aten.mean.default,
        aten.mean.dim,
        aten.sum.default,
        aten.sum.dim_IntList,
        aten.unsqueeze.default,
        aten.expand.default,
    }
)


def put_channels_innermost(graph: fx.Graph, results: int) -> None:
    """Let the convolutions of `graph` work with channels innermost. Needs the tensors' shapes in `meta["val"]`.

    results: how many of the first results somebody else gets: they are in the usual order.
    """
    called = [n for n in graph.nodes if n.op == "call_function"]
    convolutions = [n for n in called if n.target in _CONVOLUTIONS]
    if not convolutions or not all(map(_is_plain, convolutions)):
        return
    if not all(_takes_any_order(n) for n in called if any(map(_is_image, _tensors(n)))):
        return
    for node in convolutions:
        for index in _CONVOLUTIONS[node.target]:
            image = node.args[index]
            assert isinstance(image, fx.Node)
            node.update_arg(index, _in_order(graph, image, node, torch.channels_last))
        if node.target is aten.convolution_backward.default:
            _keep_order_of_weights(graph, node)
    end = graph.output_node()
    handed_out = list(end.args[0])  # type: ignore[arg-type]
    for index, result in enumerate(handed_out[:results]):
        if isinstance(result, fx.Node) and _is_image(result.meta["val"]):
            handed_out[index] = _in_order(graph, result, end, torch.contiguous_format)
    end.args = (tuple(handed_out),)


def _takes_any_order(node: fx.Node) -> bool:
    return node.target in _ANY_ORDER or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _is_plain(node: fx.Node) -> bool:
    """Whether it is a convolution in two dimensions, in float32 on a CPU, without groups, not transposed."""
    transposed, groups = (node.args[6], node.args[8]) if len(node.args) == 9 else (node.args[7], node.args[9])
    image = next(_tensors(node.all_input_nodes[0]))
    known = image.device.type == "cpu" and image.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return bool(known and image.dim() == 4 and not transposed and groups == 1)


def _keep_order_of_weights(graph: fx.Graph, node: fx.Node) -> None:
    """A weight's gradient comes in the order of the images: optimizers want it in the order of the weight."""
    for result in list(node.users):
        if result.args[1] == _WEIGHT_GRADIENT:
            users = list(result.users)
            ordered = _in_order(graph, result, result.next, torch.contiguous_format)
            for user in users:
                user.replace_input_with(result, ordered)


def _in_order(graph: fx.Graph, image: fx.Node, before: fx.Node, order: torch.memory_format) -> fx.Node:
    """The image in an order in memory, itself where it is so."""
    with graph.inserting_before(before):
        new = graph.call_function(aten.contiguous.default, (image,), {"memory_format": order})
    new.meta = dict(image.meta)
    return new


def _tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    """What it makes and takes."""
    for at in (node, *node.all_input_nodes):
        value = at.meta.get("val")
        yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, torch.Tensor))


def _is_image(tensor: torch.Tensor) -> bool:
    """Whether the order of channels in memory makes a difference."""
    return tensor.dim() == 4 and tensor.shape[1] > 1 and tensor.shape[2] * tensor.shape[3] > 1
