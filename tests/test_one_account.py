"""The two accounts of time, of plans op by op and of layouts, beside each other where both can say the same.

They differ on purpose in what only one of them knows: shapes of products, fused kernels, the host, the gradients' norm
(`autopar.predicting`), and any placement of any op (`autopar.pricing`). On devices that have none of the former, for
layouts that either can express, a step's passes and messages must come to the same.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import nn

import autopar
from autopar import ClusterSpec
from autopar.predicting.predict import Predictor
from autopar.predicting.run import Run

SEQ, BATCH = 512, 32

# One kernel an op; gradients are added up by the products that make them; DistributedDataParallel's buckets.
PLAIN = Run(fusion="none", accumulates_apart=False, bucket_bytes=25 << 20)


@cache
def cluster(gpus: int) -> ClusterSpec:
    """Devices that go by FLOPs and bytes alone, behind links that do so, too."""
    spec = ClusterSpec.preset("a100-80g", gpus=gpus)
    costs = [f.name for f in dataclasses.fields(spec.device) if f.name.startswith("host_") or f.name.endswith("_s")]
    free = {n: 0.0 for n in costs if not n.endswith("per_s")}
    device = dataclasses.replace(spec.device, multiprocessors=0, step_fraction=1.0, **free)
    links = tuple(dataclasses.replace(link, latency_s=0.0) for link in spec.links)
    return dataclasses.replace(spec, device=device, links=links, collective_launch_s=0.0)


@cache
def predictor() -> Predictor:
    return Predictor(model(), cluster(1), seq=SEQ, global_batch=BATCH, run=PLAIN)


def model() -> nn.Module:
    """Wide enough for what does not grow with the batch to be nothing beside what does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=16, vocab_size=4096,
        max_position_embeddings=SEQ, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).train()


@pytest.mark.parametrize("layout", [{"dp": 1}, {"dp": 8, "zero": 0}, {"dp": 8, "zero": 1}])
def test_passes_and_messages_come_to_the_same(layout: dict[str, int]) -> None:
    gpus = layout["dp"]
    made = autopar.plan(model(), cluster(gpus), seq=SEQ, global_batch=BATCH, pin=layout)
    assert isinstance(made, autopar.Plan)
    planned = made.predicted["breakdown"]
    named = {**layout, "micro_batch": BATCH // gpus, "grad_dtype": "bfloat16"}
    predicted = predictor().elsewhere(cluster(gpus)).predict(named).breakdown
    passes = [sum(one[key] for key in ("forward_s", "backward_s")) for one in (planned, predicted)]
    assert passes[0] == pytest.approx(passes[1], rel=0.01)
    assert planned["communication_s"] == pytest.approx(predicted["gradients_s"], rel=0.01)
    assert (planned["communication_s"] > 0) == (gpus > 1)
