"""Products by the faster library: which are taken, and that they are the same products."""

from __future__ import annotations

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  defines its grouped products
from torch import fx, nn

import autopar
from autopar._torch_compat import onednn_linear
from autopar.codegen import grouped as grouped  # defines the ops
from autopar.codegen.products import take_faster_products

aten = torch.ops.aten
needs_onednn = pytest.mark.skipif(onednn_linear is None, reason="torch was built without oneDNN")


def product(*operands: torch.Tensor, swap: tuple[int, int] | None = None) -> tuple[fx.GraphModule, bool]:
    """A graph of mm, or addmm for three operands, after the pass; the last operand transposed by `swap` if given.
    And whether its product is oneDNN's now."""
    graph = fx.Graph()
    nodes = []
    for i, tensor in enumerate(operands):
        nodes.append(graph.placeholder(f"x{i}"))
        nodes[-1].meta["val"] = tensor
    if swap is not None:
        nodes[-1] = graph.call_function(aten.permute.default, (nodes[-1], list(swap)))
        nodes[-1].meta["val"] = operands[-1].permute(swap)
    target = aten.mm.default if len(operands) == 2 else aten.addmm.default
    made = graph.call_function(target, tuple(nodes))
    made.meta["val"] = target(*(n.meta["val"] for n in nodes))
    graph.output(made)
    take_faster_products(graph)
    return fx.GraphModule({}, graph), not graph.find_nodes(op="call_function", target=target)


@needs_onednn
@pytest.mark.parametrize("case", ["mm", "addmm", "weight", "same shape, not turned", "column-major"])
def test_taken_products_are_the_same(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, square, bias = (torch.randn(s, generator=generator) for s in ((256, 512), (512, 512), (512,)))
    operands, swap = {
        "mm": ((x, square), None),
        "addmm": ((bias, x, square), None),
        "weight": ((x, square), (1, 0)),
        "same shape, not turned": ((x, square), (0, 1)),
        "column-major": ((x, square.t()), None),
    }[case]
    module, taken = product(*operands, swap=swap)
    assert taken
    *rest, last = operands
    expected = (torch.mm if len(operands) == 2 else torch.addmm)(*rest, last.permute(swap) if swap else last)
    torch.testing.assert_close(module(*operands), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "operands",
    [
        (torch.ones(256, 512, dtype=torch.float64), torch.ones(512, 512, dtype=torch.float64)),
        (torch.ones(256, 512, dtype=torch.bfloat16), torch.ones(512, 512, dtype=torch.bfloat16)),
        (torch.ones(32, 64), torch.ones(64, 64)),  # too little work
        (torch.ones(1, 8192), torch.ones(8192, 4096)),  # one row
        (torch.ones(512, 256).t(), torch.ones(512, 512)),  # a gradient of a weight
        (torch.ones(256, 512), torch.ones(512, 1024)[:, ::2]),  # every other column
        (torch.ones(256, 512), torch.ones(256, 512), torch.ones(512, 512)),  # a matrix is added, not a row
    ],
    ids=["float64", "bfloat16", "small", "one row", "turned first", "strided second", "matrix added"],
)
def test_other_products_are_left(operands: tuple[torch.Tensor, ...]) -> None:
    module, taken = product(*operands)
    assert not taken
    assert torch.isfinite(module(*operands)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ends", [[300, 300, 700], [0, 512, 512], [900, 1000, 1200], [8, 16, 24]])
def test_grouped_products_are_those_of_transformers(ends: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, g, w = (torch.randn(s, dtype=dtype, generator=generator) for s in ((1200, 512), (1200, 256), (3, 256, 512)))
    given = (x, w.transpose(1, 2), torch.tensor(ends))
    theirs, ours = torch.ops.transformers, torch.ops.autopar
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype is torch.float32 else {"rtol": 1e-12, "atol": 1e-11}
    torch.testing.assert_close(ours.grouped_product(*given), theirs.grouped_mm_fallback(*given), **close)
    for made, expected in zip(
        ours.grouped_product_backward(*given, g), theirs.grouped_mm_fallback_backward(*given, g), strict=True
    ):
        torch.testing.assert_close(made, expected, **close)
        assert made.stride() == expected.stride()


class Mlp(nn.Module):
    """Two products, one of which has no bias, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 512), nn.Linear(512, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 256]."""
        out: torch.Tensor = self.down(torch.relu(self.up(x))).square().mean()
        return out


@needs_onednn
def test_a_program_takes_them_and_computes_what_the_model_does() -> None:
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(256, 256)
    loss = model(x)
    loss.backward()
    program = autopar.compile(Mlp(), autopar.ClusterSpec.preset("cpu", gpus=1), example_inputs=((x,), {}))
    program.load_state_dict(model.state_dict())
    with torch.profiler.profile() as profile:
        program(x).backward()
    called = {e.key: e.count for e in profile.key_averages()}
    assert called["mkldnn::_linear_pointwise"] == 3  # two forward, one gradient of an input: x needs none
    assert called["aten::mm"] == 2  # the gradients of both weights
    for name, param in model.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(program.get_parameter(name).grad, param.grad, rtol=1e-4, atol=1e-7)
