"""In which dtype gradients are added up over micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar.codegen.stage_types import wider
from autopar.errors import LayoutError
from autopar.layouts import Layout
from autopar.runtime.rank_pipeline import Place, RankPipeline
from autopar.simulating.schedules import schedule_orders
from autopar.staging import gradient_dtype
from tests.runtime.chain import ROWS, WIDTH, chain

MICRO_BATCHES = 300  # each adds 2: bfloat16 has 8 bits, and stops counting at 512


@pytest.fixture
def alone() -> Iterator[None]:
    """A job of one process."""
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("sums", "expected"), [(None, 512.0), (torch.float32, 600.0)])
def test_sums_of_many_micro_batches(sums: torch.dtype | None, expected: float) -> None:
    program, orders = chain(1, torch.bfloat16), schedule_orders("gpipe", 1, MICRO_BATCHES)
    place = Place(dist.group.WORLD, (), (), torch.device("cpu"))  # type: ignore[arg-type]
    pipeline = RankPipeline(program, orders, {name: name for name in program.owners}, place, sums)
    ones = torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)
    batches = [{"x": ones, "t": ones.new_ones(())}] * MICRO_BATCHES
    found = pipeline.step({"w0": ones[0], "v": torch.zeros_like(ones[0])}, batches)["w0"]
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [expected] * WIDTH


@pytest.mark.parametrize(("params", "asked", "sums"), [
    ("bfloat16", "float32", "float32"), ("float32", "float32", "float32"), ("float64", "float32", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"), ("float32", None, None),
])  # fmt: skip
def test_what_a_layout_asks_for(params: str, asked: str | None, sums: str | None) -> None:
    """Never narrower than the gradients are: see `wider`."""
    found = gradient_dtype(plan_that_asks(asked), model_in(params))
    assert found == (None if sums is None else getattr(torch, sums))
    dtype: torch.dtype = getattr(torch, params)
    assert wider(dtype, found).itemsize >= dtype.itemsize


def test_gradients_narrower_than_parameters_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"grad_dtype=bfloat16 can be priced, not run, for parameters in float32"):
        gradient_dtype(plan_that_asks("bfloat16"), model_in("float32"))


def plan_that_asks(grad_dtype: str | None) -> Any:
    return SimpleNamespace(named=Layout(pp=2, grad_dtype=grad_dtype))


def model_in(dtype: str) -> Any:
    return SimpleNamespace(params=[SimpleNamespace(dtype=getattr(torch, dtype))])
