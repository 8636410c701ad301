"""Fused attention of keys whose rows are not side by side in memory, as those glued along their last dim are."""

from __future__ import annotations

import torch
from torch import fx

from autopar import attention_kernels
from autopar._torch_compat import fake_tensor_mode
from autopar.codegen.builder import GraphBuilder
from autopar.codegen.lowerings import lower
from autopar.rules import AxisRule
from autopar.rules.schema import op_call

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, a key whose last dim has a stride, value."""
    torch.manual_seed(0)
    query, value = torch.randn(2, 4, 8, 2).double(), torch.randn(2, 4, 8, 2).double()
    return query, torch.randn(2, 4, 2, 8).double().transpose(2, 3), value


def expected() -> torch.Tensor:
    query, key, value = operands()
    return torch.softmax(query @ key.transpose(2, 3) / 2**0.5, -1) @ value


def test_the_kernels_copy_what_they_cannot_read() -> None:
    query, key, value = operands()
    out, _ = attention_kernels.forward(query, key, value, None, False, None)
    torch.testing.assert_close(out, expected(), rtol=1e-12, atol=1e-12)


def test_the_lowering_copies_what_the_kernel_cannot_read() -> None:
    mode = fake_tensor_mode()
    query, key, value = operands()
    builder = GraphBuilder((2,), mode)
    graph = fx.Graph()
    given = []
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        node = graph.placeholder(name)
        node.meta["val"] = mode.from_tensor(tensor)
        given.append(node)
    node = graph.call_function(ATTENTION, tuple(given))
    with mode:
        node.meta["val"] = ATTENTION(*(n.meta["val"] for n in given))
    assert op_call(node).name == "aten._scaled_dot_product_flash_attention_for_cpu"
    inputs = [builder.placeholder(n.name, n.meta["val"]) for n in given]
    rule = AxisRule(("R", "R", "R"), ("R", "R"))
    out, _ = lower(builder, node, (rule,), inputs)
    builder.output([out])
    made = fx.GraphModule(torch.nn.Module(), builder.graph)(0, query, key, value)
    torch.testing.assert_close(made[0], expected(), rtol=1e-12, atol=1e-12)
