"""Config files, callables, and their example inputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autopar.errors import TraceError
from autopar.models import attention_heads, example_inputs, load_model
from autopar.trace import trace


def test_tiny_llama_runs_and_traces() -> None:
    model = load_model("tiny-llama", device="cpu", dtype=torch.float64, attention="eager")
    assert model.config._attn_implementation == "eager" and model.config.use_cache is False
    args, kwargs = example_inputs(model, 2, 16, device="cpu")
    assert model(*args, **kwargs).logits.dtype == torch.float64
    traced = trace(load_model("tiny-llama"), example_inputs(model, 2, 16))
    assert [(i.path, i.shape) for i in traced.inputs] == [("input_ids", (2, 16)), ("labels", (2, 16))]


def test_config_alone_says_what_is_different() -> None:
    bert = load_model("bert-large", dtype=torch.bfloat16)
    assert {p.dtype for p in bert.parameters()} == {torch.bfloat16}
    assert load_model("mixtral-8x7b", experts="batched_mm").config._experts_implementation == "batched_mm"
    assert bert.config.hidden_dropout_prob == 0.1


def write_config(folder: Path, **values: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
FILES: list[tuple[dict[str, Any], str, dict[str, tuple[int, ...]]]] = [
    (
        {"model_type": "llama", "vocab_size": 64, **SMALL},
        "LlamaForCausalLM",
        {"input_ids": (4, 8), "labels": (4, 8)},
    ),
    (
        {"model_type": "bert", "vocab_size": 64, "architectures": ["BertForSequenceClassification"], **SMALL},
        "BertForSequenceClassification",
        {"input_ids": (4, 8), "labels": (4,)},
    ),
    (
        {"model_type": "vit", "image_size": 32, "patch_size": 16, "architectures": ["ViTForImageClassification"],
         **SMALL},
        "ViTForImageClassification",
        {"pixel_values": (4, 3, 32, 32), "labels": (4,)},
    ),
    (
        {"model_type": "t5", "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4,
         "decoder_start_token_id": 0, "architectures": ["T5ForConditionalGeneration"]},
        "T5ForConditionalGeneration",
        {"input_ids": (4, 8), "labels": (4, 8)},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "class_name", "shapes"), FILES, ids=[f[1] for f in FILES])
def test_config_file(tmp_path: Path, values: dict[str, Any], class_name: str, shapes: dict[str, Any]) -> None:
    path = write_config(tmp_path, **values)
    model = load_model(path)
    assert type(model).__name__ == class_name
    assert type(load_model(str(tmp_path))).__name__ == class_name
    inputs = example_inputs(model, 4, 8)
    assert {name: tuple(t.shape) for name, t in inputs[1].items()} == shapes
    assert len(trace(model, inputs).grads) > 0


def test_config_keeps_its_dtype_and_dropout(tmp_path: Path) -> None:
    path = write_config(tmp_path, model_type="gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=4, dtype="bfloat16")
    model = load_model(path)
    assert model.config.attn_pdrop == 0.1 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(path, dtype=torch.float32).parameters()} == {torch.float32}


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4))


def make_nothing() -> int:
    return 3


def test_callable() -> None:
    model = load_model("tests.test_models:make", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    assert next(load_model("tests.test_models:make", device="cpu").parameters()).device.type == "cpu"


BAD_SPECS = [
    ("llama3-8B", r"unknown model 'llama3-8B' \(did you mean llama3-8b"),
    ("something", "unknown model 'something'; give a name"),
    ("no/such/config.json", "cannot read model config 'no/such/config.json': No such file"),
    ("no_such_package:make", "cannot import 'no_such_package'"),
    ("tests.test_models:mak", r"has no callable 'mak' \(did you mean make"),
    ("tests.test_models:make_nothing", "returned a int, not an nn.Module"),
]


@pytest.mark.parametrize(("spec", "problem"), BAD_SPECS)
def test_bad_spec(spec: str, problem: str) -> None:
    with pytest.raises(TraceError, match=problem):
        load_model(spec)


def test_options_of_a_callable_are_refused() -> None:
    with pytest.raises(TraceError, match="attn_implementation can't be set"):
        load_model("tests.test_models:make", attention="eager")


BAD_CONFIGS: list[tuple[str, str]] = [
    ("{", "cannot read model config"),
    ("[1]", "has no model_type"),
    ('{"model_type": "no_such_type"}', "transformers does not accept"),
    ('{"model_type": "vit"}', "names no architectures"),
    ('{"model_type": "llama", "architectures": ["NoSuchModel"]}', "asks for 'NoSuchModel', which transformers"),
    ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}', "change the config"),
]


@pytest.mark.parametrize(("text", "problem"), BAD_CONFIGS)
def test_bad_config(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(TraceError, match=problem) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TraceError, match=r"model 'llama3-8b' needs transformers .*pip install transformers"):
        load_model("llama3-8b")


class Own(nn.Linear):
    def example_inputs(self, batch: int, seq: int | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.zeros(batch, self.in_features, device="meta"),), {}


def test_example_inputs_of_other_models() -> None:
    args, kwargs = example_inputs(Own(4, 4), 6)
    assert args[0].shape == (6, 4) and kwargs == {}
    with pytest.raises(TraceError, match=r"no example inputs are known for Linear; pass example_inputs="):
        example_inputs(nn.Linear(4, 4), 6, 8)
    unknown = nn.Linear(4, 4)
    unknown.config = SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(TraceError, match="no example inputs are known"):
        example_inputs(unknown, 6, 8)


def test_sequence_length_is_checked() -> None:
    model = load_model("bert-large")
    with pytest.raises(TraceError, match=r"seq=513 exceeds the 512 positions of bert\.embeddings\.position_embeddings"):
        example_inputs(model, 8, 513)
    with pytest.raises(TraceError, match="pass seq="):
        example_inputs(model, 8)


@pytest.mark.parametrize(
    ("name", "heads"),
    [("llama3-8b", (32, 8)), ("megatron-22b", (64, 64)), ("bloom-176b", (112, 112)), ("vit-22b", (48, 48))],
)
def test_attention_heads(name: str, heads: tuple[int, int]) -> None:
    assert attention_heads(load_model(name)) == heads
    assert attention_heads(nn.Linear(4, 4)) == (None, None)


def test_an_open_config_takes_the_open_dtype(tmp_path: Path) -> None:
    path = write_config(tmp_path, model_type="gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=4)
    made = [load_model(path), load_model(path, open_dtype=torch.bfloat16)]
    made += [load_model(path, dtype=torch.float64, open_dtype=torch.bfloat16)]
    made += [load_model("mistral-7b", open_dtype=torch.float16)]
    dtypes = [next(model.parameters()).dtype for model in made]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float64, torch.bfloat16]
