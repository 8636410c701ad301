"""The zoo: every model builds on the meta device and has the size that was published for it."""

from __future__ import annotations

import pytest

from autopar.errors import TraceError
from autopar.models import example_inputs, load_model
from autopar.zoo import ZOO

# Parameters as published (millions), by the papers and model cards that `ZOO` names.
PUBLISHED = {
    "llama2-7b": 6738,
    "llama2-13b": 13016,
    "llama2-70b": 68977,
    "llama3-8b": 8030,
    "llama3-70b": 70554,
    "llama3-405b": 405853,
    "nanotron-1.3b": 1342,
    "nanotron-3.6b": 3574,
    "nanotron-8.9b": 8858,
    "nanotron-80b": 79990,
    "mistral-7b": 7242,
    "mixtral-8x7b": 46703,
    "mixtral-8x22b": 140621,
    "qwen3-0.6b": 596,
    "qwen3-1.7b": 1721,
    "qwen3-4b": 4022,
    "qwen3-8b": 8191,
    "qwen3-14b": 14768,
    "qwen3-32b": 32762,
    "qwen3-30b-a3b": 30532,
    "qwen3-235b-a22b": 235094,
    "gpt3-175b": 174600,
    "megatron-1.7b": 1700,
    "megatron-3.6b": 3600,
    "megatron-7.5b": 7500,
    "megatron-18b": 18400,
    "megatron-22b": 22000,
    "megatron-39b": 39100,
    "megatron-76b": 76100,
    "megatron-145b": 145600,
    "megatron-310b": 310100,
    "megatron-530b": 529600,
    "megatron-1t": 1008000,
    "deepseek-v3": 671026,
    "bloom-176b": 176247,
    "bert-large": 335,
    "vit-22b": 21743,
}


# (name, tokens or pixels) of models whose example inputs differ in kind.
INPUTS = {"megatron-22b": (2, 2048), "bert-large": (2, 512), "vit-22b": (2, 3, 224, 224), "deepseek-v3": (2, 4096)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_size(name: str) -> None:
    model = load_model(name)
    assert model.training and {p.device.type for p in model.parameters()} == {"meta"}
    rounding = 50 if name.startswith("megatron") else 0  # that paper gives tenths of 10^9
    counted = sum(p.numel() for p in model.parameters()) / 1e6
    assert counted == pytest.approx(PUBLISHED[name], rel=0.01, abs=rounding)


def test_every_entry_says_where_it_comes_from() -> None:
    assert set(PUBLISHED) | {"tiny-llama"} == set(ZOO) and all(m.source for m in ZOO.values())


@pytest.mark.parametrize("name", INPUTS)
def test_example_inputs(name: str) -> None:
    shape = INPUTS[name]
    _, kwargs = example_inputs(load_model(name), 2, None if len(shape) == 4 else shape[1])
    assert tuple(next(iter(kwargs.values())).shape) == shape


def test_attention_is_an_option() -> None:
    assert {load_model("megatron-22b", attention=a).config._attn_implementation for a in ("eager", "sdpa")} == {
        "eager",
        "sdpa",
    }
    assert load_model("megatron-22b").config.activation_function == "gelu"


def test_a_near_name_is_offered() -> None:
    with pytest.raises(TraceError, match=r"unknown model 'megatron-23b' \(did you mean"):
        load_model("megatron-23b")
