"""Left alone, the search finds what experts do. Nothing in it knows these layouts; no pin here forces an answer."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import autopar
from autopar import ClusterSpec, Plan
from autopar.cost.collectives import axis_span
from autopar.cost.compute import OpClass, op_class
from autopar.cost.model import CostModel
from autopar.dataflow import module_path
from autopar.opcost import op_flops_of


class Block(nn.Module):
    """One layer of a transformer, 12 x width x width parameters."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x)
        split = [proj(normed).view(*x.shape[:2], self.heads, -1).transpose(1, 2) for proj in (self.q, self.k, self.v)]
        mixed = nn.functional.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Stack(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@cache
def h100(gpus: int, gbit: float | None = None) -> ClusterSpec:
    network = {} if gbit is None else {"inter_node_gbit_per_s": gbit}
    return ClusterSpec.preset("h100-sxm", gpus=gpus, **network)


def planned(width: int, layers: int, batch: int, seq: int, cluster: ClusterSpec, **options: Any) -> Plan:
    """The plan of `layers` blocks in bfloat16 on a batch of sequences that need no gradient."""
    with torch.device("meta"):
        model = Stack(width, layers).to(torch.bfloat16)
        x = torch.empty(batch, seq, width, dtype=torch.bfloat16)
    return autopar.plan(model, cluster, example_inputs=((x,), {}), **{"time_limit_s": 20, **options})


def collectives(plan: Plan, what: str) -> Counter[tuple[str, str]]:
    """(pass, kind) of the collectives on "parameters", "gradients" or "activations", with how many there are.

    A single number (the loss) is not counted.
    """
    assert plan.bench is not None
    attribution = plan.bench.attribution(plan)
    found: Counter[tuple[str, str]] = Counter()
    for transfer in attribution.price.transfers:
        for kind, _, nbytes, _ in transfer.steps:
            if kind != "slice" and nbytes > 8 and attribution.role(transfer).startswith(what):
                found[transfer.phase, kind] += 1
    return found


def memory(plan: Plan) -> dict[str, int]:
    parts: dict[str, int] = plan.predicted["breakdown"]["memory_bytes"]
    return parts


def cut(plan: Plan, name: str) -> set[tuple[str, ...]]:
    """The placements of the parameters of that name in all layers."""
    return {state for fqn, state in plan.decisions.params.items() if f".{name}." in fqn}


# -- data parallelism ----------------------------------------------------------------------------


def test_data_parallelism_for_a_small_model_and_a_large_batch() -> None:
    plan = planned(256, 2, 256, 128, h100(8))
    assert plan.status == "optimal"
    assert (plan.mesh, plan.roles) == ((8,), ("dp",))
    assert all(state == ("R",) for state in plan.decisions.params.values())
    gradients = collectives(plan, "gradients")
    assert set(gradients) == {("backward", "all_reduce")} and gradients["backward", "all_reduce"] >= 16
    assert not collectives(plan, "parameters")


def test_sharded_parameters_when_memory_is_short() -> None:
    """Replicated parameters, while they fit; without that room they are cut over the data ranks and gathered."""
    roomy = planned(1024, 1, 8, 1024, h100(2))
    assert roomy.roles == ("dp",) and roomy.layout()["zero"] == 0 and not collectives(roomy, "parameters")
    held = memory(roomy)
    limit = roomy.predicted["peak_bytes"] - int(0.5 * (held["parameters"] + held["optimizer"]))  # most must be cut
    short = planned(1024, 1, 8, 1024, h100(2), memory_limit_bytes=limit, pin={"recompute": "none"})
    assert short.roles == ("dp",) and short.layout()["zero"] >= 2
    assert collectives(short, "parameters")["forward", "all_gather"] > 0
    assert collectives(short, "gradients")["backward", "reduce_scatter"] > 0
    assert memory(short)["parameters"] < 0.8 * held["parameters"]
    assert roomy.objective_s < short.objective_s < 1.05 * roomy.objective_s


# -- tensor parallelism ---------------------------------------------------------------------------


@cache
def long_sequence(limit: int | None = None) -> Plan:
    """Two layers on one sequence: few samples to cut, and weights larger than activations."""
    options: dict[str, Any] = {} if limit is None else {"memory_limit_bytes": limit, "pin": {"recompute": "none"}}
    return planned(2048, 2, 1, 4096, h100(2), **options)


def test_megatron_cuts_columns_then_rows_with_one_all_reduce_each_way() -> None:
    plan = long_sequence()
    assert plan.status == "optimal" and plan.roles == ("tp",)
    for name in ("q", "k", "v", "up"):  # columns of the product; a weight of nn.Linear is [out, in]
        assert cut(plan, name) == {("S(0)",)}
    for name in ("o", "down"):
        assert cut(plan, name) == {("S(1)",)}
    found = collectives(plan, "activations")
    assert set(found) == {("forward", "all_reduce"), ("backward", "all_reduce")}
    assert found["forward", "all_reduce"] == 4  # one in attention, one in the MLP, of two layers
    assert found["backward", "all_reduce"] == 3  # the input of the first layer has no gradient
    assert not collectives(plan, "parameters")


def test_norms_are_cut_along_the_sequence_when_memory_is_tight() -> None:
    roomy = long_sequence()
    assert not roomy.layout()["sp"]
    # A tenth would be about what gradients of weights hold that are put off while there is room (`codegen/beside.py`).
    tight = long_sequence(roomy.predicted["peak_bytes"] - memory(roomy)["activations"] // 6)
    assert tight.roles == ("tp",) and tight.layout()["sp"]
    assert tight.bench is not None
    nodes = {n.name: n for n in tight.bench.trace.graph_module.graph.nodes}
    norms = [n for n in nodes if n.startswith("native_layer_norm") and "backward" not in n]
    states = [tight.decisions.nodes[n].result_states[0] for n in norms]
    assert len(norms) == 4 and states.count(("S(1)",)) >= 2
    assert cut(tight, "up") == {("S(0)",)} and cut(tight, "down") == {("S(1)",)}  # the products are cut as before
    found = collectives(tight, "activations")
    assert found["forward", "reduce_scatter"] > 0 and found["forward", "all_gather"] > 0
    assert found["forward", "all_reduce"] < 4
    assert memory(tight)["activations"] < memory(roomy)["activations"]


def test_tensor_parallelism_inside_the_node_and_data_parallelism_across_a_slow_link() -> None:
    # On A100, whose all-reduces are rings: on H100 a node sums in its switches, which makes eight replicas on two
    # as cheap for the network as two, and tensor parallelism of two is then enough for these short sequences.
    a100 = ClusterSpec.preset("a100-80g", gpus=16, inter_node_gbit_per_s=100)
    for plan in (planned(8192, 1, 16, 3072, a100), planned(8192, 1, 2, 24576, h100(16, gbit=100))):
        assert (plan.mesh, plan.roles) == ((2, 8), ("dp", "tp"))
    costs = CostModel(plan.cluster, plan.mesh)
    assert [axis_span(axis, plan.cluster).nodes for axis in costs.axes] == [2, 1]


# -- recomputation ----------------------------------------------------------------------------------


@cache
def wide_batch() -> Plan:
    """Two data parallel ranks whose memory is mostly activations."""
    return planned(512, 2, 16, 512, h100(2))


def test_recomputation_only_where_it_pays() -> None:
    """Nothing while memory lasts; then what is cheap for its bytes (norms, activations), and products last."""
    roomy = wide_batch()
    assert not any(d.recompute for d in roomy.decisions.nodes.values())
    held, peak = memory(roomy)["activations"], roomy.predicted["peak_bytes"]
    again, flops = [], []
    for share in (0.2, 0.5):
        limit = peak - int(share * held)
        plan = planned(512, 2, 16, 512, h100(2), memory_limit_bytes=limit, time_limit_s=10)
        assert plan.bench is not None and plan.predicted["peak_bytes"] <= limit
        nodes = {n.name: n for n in plan.bench.trace.graph_module.graph.nodes}
        ops = [nodes[name] for name, d in plan.decisions.nodes.items() if d.recompute]
        again.append(ops)
        flops.append(sum(op_flops_of(n) for n in ops))
        assert plan.objective_s < 1.2 * roomy.objective_s
    assert flops[0] == 0 < flops[1] and 0 < len(again[0]) < len(again[1])
    assert all(op_class(n.target) not in (OpClass.MATMUL, OpClass.ATTENTION) for n in again[0])
    assert all("layers." in module_path(n) for ops in again for n in ops)


def test_no_recomputation_under_a_limit_that_is_just_enough() -> None:
    roomy = wide_batch()
    again = planned(512, 2, 16, 512, h100(2), memory_limit_bytes=roomy.predicted["peak_bytes"])
    assert not any(d.recompute for d in again.decisions.nodes.values())
    assert again.objective_s == pytest.approx(roomy.objective_s, rel=1e-4)
