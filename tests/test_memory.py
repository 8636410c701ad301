"""Predicted against measured peak memory: torch's tracker watches rank 0 of the emitted program train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import autopar
from autopar.errors import AutoparError
from autopar.runtime import world
from autopar.runtime.memory import measure_peak
from tests.peaks import peak_of_training
from tests.vision import ResNet

TOLERANCE = 0.05
BATCH, SEQ, VOCAB = 8, 128, 512


@pytest.fixture
def rank_0_of_4(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is rank 0 of 4: collectives allocate their results and move nothing."""
    monkeypatch.setattr(world, "start_heartbeat", lambda: None)  # there are no other ranks that could die
    world.device_mesh.cache_clear()
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        world.device_mesh.cache_clear()


def llama(layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A Llama in float32 whose activations outweigh its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=SEQ,
        use_cache=False,
    )
    ids = torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids.clone()}


def bert(layers: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A BERT in float32 for masked language modelling."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=SEQ,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    return BertForMaskedLM(config), {"input_ids": ids, "labels": ids.clone()}


def resnet(_: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small ResNet in float32, on images large enough that its activations outweigh its parameters."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 64, 64, generator=draw)
    return ResNet(), {"pixels": images, "labels": torch.randint(0, 16, (BATCH,), generator=draw)}


MODELS = {"llama": llama, "bert": bert, "resnet": resnet}


def compare(layers: int, pin: dict[str, Any], limit_fraction: float, name: str = "llama") -> tuple[int, autopar.Plan]:
    """(Measured bytes, plan) of the fastest plan under a fraction of the memory that the free plan takes."""
    model, batch = MODELS[name](layers)
    cluster = autopar.ClusterSpec.preset("cpu", gpus=4)
    call = ((), batch)
    free = autopar.plan(model, cluster, example_inputs=call, pin=pin, time_limit_s=10)
    limit = int(free.predicted["peak_bytes"] * limit_fraction) if limit_fraction < 1 else None
    program = autopar.compile(model, cluster, example_inputs=call, pin=pin, memory_limit_bytes=limit, time_limit_s=10)
    assert program.plan is not None
    return peak_of_training(program, batch), program.plan


def check(layers: int, pin: dict[str, Any], limit_fraction: float, name: str = "llama") -> None:
    """Measured is as predicted, within the limit, and recomputation was at work where the limit is tight."""
    measured, plan = compare(layers, pin, limit_fraction, name)
    predicted = plan.predicted["peak_bytes"]
    recomputed = sum(d.recompute for d in plan.decisions.nodes.values())
    assert (recomputed > 0) == (limit_fraction < 1)
    assert abs(measured - predicted) <= TOLERANCE * measured, f"measured {measured}, predicted {predicted}"
    assert measured <= plan.options.memory_limit_bytes
    persistent = plan.predicted["breakdown"]["memory_bytes"]
    assert persistent["activations"] > persistent["parameters"] or limit_fraction < 1


@pytest.mark.usefixtures("rank_0_of_4")
@pytest.mark.parametrize(
    ("limit_fraction", "pin"),
    [
        (1.0, {"mesh": [4]}),
        (1.0, {"dp": 2, "tp": 2}),
        (0.7, {"mesh": [4]}),
        pytest.param(0.7, {"dp": 2, "tp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_peak_is_as_predicted(limit_fraction: float, pin: dict[str, Any]) -> None:
    check(2, pin, limit_fraction)


@pytest.mark.slow
@pytest.mark.usefixtures("rank_0_of_4")
@pytest.mark.parametrize("pin", [{"mesh": [4]}, {"dp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize("limit_fraction", [1.0, 0.75, 0.5])
def test_peak_of_a_deeper_model_is_as_predicted(pin: dict[str, Any], limit_fraction: float) -> None:
    check(4, pin, limit_fraction)


@pytest.mark.usefixtures("rank_0_of_4")
@pytest.mark.parametrize("name", ["bert", "resnet"])
@pytest.mark.parametrize(
    ("limit_fraction", "pin"),
    [
        (1.0, {"mesh": [4]}),
        pytest.param(1.0, {"dp": 2, "tp": 2}, marks=pytest.mark.slow),
        (0.7, {"mesh": [4]}),
        pytest.param(0.7, {"dp": 2, "tp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_peak_of_other_models_is_as_predicted(name: str, limit_fraction: float, pin: dict[str, Any]) -> None:
    check(1, pin, limit_fraction, name)


def test_measures_what_is_alive_at_the_highest_point() -> None:
    before = torch.zeros(1000, dtype=torch.float64)

    def step() -> None:
        a = before + 1  # 8,000 bytes
        b = torch.cat([a, a])  # 16,000: with `before` 32,000
        del a
        c = b[:10] * 2  # 80; a is gone
        del b, c
        torch.ones(500, dtype=torch.float64)  # 4,000, after the peak

    assert measure_peak(step, before) == 32_000
    assert measure_peak(step) == 24_000


def test_nothing_to_measure() -> None:
    with pytest.raises(AutoparError, match="saw no tensor"):
        measure_peak(lambda: None)
