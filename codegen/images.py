"""Images with their channels innermost, where convolutions run on a CPU.

oneDNN lays out every operand anew that comes as torch makes it, channel by channel, and its result back; images whose
channels are innermost in memory (`torch.channels_last`) it takes as they are. Shapes and numbers stay the same, only
strides differ: 13 % less time for the ResNet of `benchmarks/throughput.py` (float32, AMD EPYC, one thread). Graphs in
which an op looks at images otherwise than pixel by pixel or channel by channel are left as they are: a view would
become a copy there.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from autopar.dataflow import result_metas

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
_OF_WEIGHT = 1  # of the results of convolution_backward
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
        aten.slice.Tensor,
    }
)


def put_channels_innermost(graph: fx.Graph, results: int) -> None:
    """Let the convolutions of `graph` work with channels innermost, where shapes are known (`meta["val"]`).

    results: how many of the first results somebody else gets: they are in the usual order.
    """
    convolutions = [n for n in graph.nodes if n.target in _CONVOLUTIONS]
    if not convolutions or not all(map(_is_plain, convolutions)):
        return
    images = _images(graph, convolutions)
    if not all(_takes_any_order(n) for n in graph.nodes if n.op == "call_function" and images & {*n.all_input_nodes}):
        return
    for node in convolutions:
        for index in _image_places(node):
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


def _images(graph: fx.Graph, convolutions: list[fx.Node]) -> set[fx.Node]:
    """Tensors that may come to have channels innermost: what is given, and what is made of it, but weights."""
    weights: set[fx.Node] = set()  # and what they are gathered from
    left = [w for n in convolutions for w in n.args[len(_image_places(n)) :] if isinstance(w, fx.Node)]
    while left:
        weights.add(weight := left.pop())
        left += [w for w in weight.all_input_nodes if w not in weights]
    found: set[fx.Node] = set()
    for node in graph.nodes:
        of_weights = node in weights or _is_weight_gradient(node)
        given = node.op == "placeholder" or node.target in _CONVOLUTIONS or found & {*node.all_input_nodes}
        if given and not of_weights and any(map(_is_image, result_metas(node))):
            found.add(node)
    return found


def _image_places(convolution: fx.Node) -> tuple[int, ...]:
    """Which of its arguments are images; they come first."""
    return (0, 1) if convolution.target is aten.convolution_backward.default else (0,)


def _is_weight_gradient(node: fx.Node) -> bool:
    if node.target is not operator.getitem:
        return False
    of, index = node.args
    return isinstance(of, fx.Node) and of.target is aten.convolution_backward.default and bool(index == _OF_WEIGHT)


def _takes_any_order(node: fx.Node) -> bool:
    return bool(node.target in _ANY_ORDER or torch.Tag.pointwise in getattr(node.target, "tags", ()))


def _is_plain(node: fx.Node) -> bool:
    """Whether it is a convolution in two dimensions, in float32 on a CPU, without groups, not transposed."""
    transposed, groups = (node.args[6], node.args[8]) if len(node.args) == 9 else (node.args[7], node.args[9])
    image = next(iter(result_metas(node.all_input_nodes[0])), None)
    if image is None:
        return False  # read back from what `dump_dir` wrote, without shapes
    known = image.device.type == "cpu" and image.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return bool(known and image.dim() == 4 and not transposed and groups == 1)


def _keep_order_of_weights(graph: fx.Graph, node: fx.Node) -> None:
    """A weight's gradient comes in the order of the images: optimizers want it in the order of the weight."""
    for result in list(node.users):
        if _is_weight_gradient(result):
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


def _is_image(tensor: torch.Tensor | None) -> bool:
    """Whether the order of channels in memory makes a difference."""
    return tensor is not None and tensor.dim() == 4 and tensor.shape[1] > 1 and tensor.shape[2] * tensor.shape[3] > 1
