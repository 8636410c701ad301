"""The cost model of a mesh, and the optimizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster import ClusterSpec
from autopar.cost.collectives import MeshAxis, collective_time_s
from autopar.cost.compute import OpClass, op_time_s
from autopar.cost.model import CostModel
from autopar.cost.optimizer import OptimizerSpec, optimizer_time_s
from autopar.errors import AutoparError, ClusterSpecError

CLUSTER = ClusterSpec.preset("h100-sxm", gpus=16)
DEVICE = CLUSTER.device
MODEL = CostModel(CLUSTER, (2, 8))
STREAM = DEVICE.memory_bytes_per_s * DEVICE.memory_efficiency_fraction


def test_it_asks_the_parts():
    assert MODEL.axes == (MeshAxis(2, 8), MeshAxis(8, 1))
    assert MODEL.op_s(OpClass.MATMUL, 1e12, 1e6, "bfloat16") == op_time_s(DEVICE, OpClass.MATMUL, 1e12, 1e6, "bfloat16")
    for axis in (0, 1):
        expected = collective_time_s("all_reduce", 1e6, MODEL.axes[axis], CLUSTER)
        assert MODEL.collective_s("all_reduce", 1e6, axis) == expected
    assert MODEL.collective_s("all_reduce", 1e6, 0) > MODEL.collective_s("all_reduce", 1e6, 1)
    assert MODEL.optimizer_s(1e6, 2e6) == optimizer_time_s(DEVICE, 1e6, 2e6)


def test_a_copy_reads_and_writes():
    assert MODEL.copy_s(STREAM) == pytest.approx(2.0 + DEVICE.launch_overhead_s)
    assert MODEL.copy_s(1) >= DEVICE.launch_overhead_s
    assert MODEL.copy_s(0) == 0


def test_it_is_a_value():
    assert CostModel(CLUSTER, [2, 8]) == MODEL  # type: ignore[arg-type]
    assert hash(CostModel(CLUSTER, (2, 8))) == hash(MODEL)


def test_a_mesh_must_fit():
    with pytest.raises(ClusterSpecError, match=r"a mesh of \(4, 8\) has 32 ranks.*has 16"):
        CostModel(CLUSTER, (4, 8))


def test_one_device_needs_no_mesh():
    alone = CostModel(ClusterSpec.preset("cpu", gpus=1), ())
    assert alone.axes == ()
    assert alone.op_s(OpClass.MATMUL, 1e9, 1e6, "float64") > 0


@pytest.mark.parametrize(("name", "states"), [("adamw", 2), ("adam", 2), ("sgd-momentum", 1), ("sgd", 0), ("none", 0)])
def test_optimizer_states(name, states):
    spec = OptimizerSpec(name)
    assert spec.state_bytes_per_param("float32") == 4 * states
    assert spec.state_bytes_per_param("bfloat16") == 2 * states
    assert spec.state_bytes(1000) == 1000 * states
    assert spec.updates == (name != "none")


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd-momentum", "sgd"])
def test_optimizer_states_are_those_that_torch_keeps(name):
    import torch

    weight = torch.nn.Parameter(torch.ones(100))
    weight.grad = torch.ones(100)
    made = {
        "adamw": lambda: torch.optim.AdamW([weight]),
        "adam": lambda: torch.optim.Adam([weight]),
        "sgd-momentum": lambda: torch.optim.SGD([weight], lr=0.1, momentum=0.9),
        "sgd": lambda: torch.optim.SGD([weight], lr=0.1),
    }[name]()
    made.step()
    kept = [t for t in made.state[weight].values() if torch.is_tensor(t) and t.numel() == 100]
    assert sum(t.numel() * t.element_size() for t in kept) == OptimizerSpec(name).state_bytes(400)


def test_optimizer_errors():
    with pytest.raises(AutoparError, match="unknown optimizer 'lion'; use one of adamw, adam, sgd-momentum, sgd, none"):
        OptimizerSpec("lion")
    with pytest.raises(AutoparError, match="no optimizer state for parameters of dtype int64"):
        OptimizerSpec("adam").state_bytes_per_param("int64")


def test_optimizer_time_is_that_of_memory():
    """AdamW: reads parameter, gradient, two states, writes parameter and two states: seven passes."""
    nbytes = STREAM
    expected = 7.0 + DEVICE.launch_overhead_s
    assert optimizer_time_s(DEVICE, nbytes, OptimizerSpec("adamw").state_bytes(int(nbytes))) == pytest.approx(expected)
    assert optimizer_time_s(DEVICE, 0, 0) == 0
    with pytest.raises(ValueError, match="none may be < 0"):
        optimizer_time_s(DEVICE, -1, 0)


@given(st.floats(1, 1e12), st.floats(0, 1e12), st.floats(0, 1e12))
def test_optimizer_time_grows(params, states, more):
    base = optimizer_time_s(DEVICE, params, states)
    assert optimizer_time_s(DEVICE, params + more, states) >= base
    assert optimizer_time_s(DEVICE, params, states + more) >= base
