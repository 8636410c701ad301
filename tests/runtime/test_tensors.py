"""What a step does with DTensors instead of asking DTensor: the same tensors, made without its dispatch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from autopar._torch_compat import dtensor_maker, local_detached


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_a_dtensor_of_a_known_layout_is_the_one_that_from_local_makes(mesh: DeviceMesh) -> None:
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    known = DTensor.from_local(first, mesh, [Shard(1)], run_check=False)
    made = dtensor_maker(known)(second)
    expected = DTensor.from_local(second, mesh, [Shard(1)], run_check=False)
    assert (made.shape, made.stride(), made.dtype, made.placements) == (
        expected.shape, expected.stride(), expected.dtype, expected.placements,
    )  # fmt: skip
    assert not made.requires_grad
    assert made.to_local().data_ptr() == second.data_ptr()
    assert torch.equal((made + expected).to_local(), second + second)  # DTensor takes it as one of its own


def test_a_detached_part_sees_what_is_done_to_its_parameter(mesh: DeviceMesh) -> None:
    param = nn.Parameter(DTensor.from_local(torch.ones(3, 4), mesh, [Shard(1)], run_check=False))
    part = local_detached(param)
    assert not part.requires_grad
    assert not isinstance(part, (DTensor, nn.Parameter))
    before = param._version
    with torch.no_grad():
        param.mul_(2.0)
    assert param._version > before  # which the part does not say: a program watches the DTensor
    assert torch.equal(part, torch.full((3, 4), 2.0))
