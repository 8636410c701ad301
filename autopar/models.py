"""Models by name: what `--model` accepts, and example inputs for transformers models.

A spec is one of
    a name of the zoo           llama3-8b, bert-large, ...: built from a config with random weights, no download
    a path to a config.json     of a Hugging Face model; the class is the one in `architectures`
    package.module:callable     the callable takes no argument and returns an nn.Module
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from autopar.errors import TraceError
from autopar.zoo import ZOO

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Dtypes = tuple[torch.dtype | None, torch.dtype | None]  # what is asked for, and what an open config gets


def load_model(
    spec: str,
    *,
    device: str = "meta",
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    experts: str | None = None,
    open_dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model that `spec` names (see the module), in train mode, with random weights on `device`.

    dtype: of the parameters; None: the config's own, else `open_dtype`, else float32.
    attention / experts: implementation of attention ("eager", "sdpa") and of experts ("grouped_mm",
        "batched_mm") of a transformers model; None: its default.
    Raises TraceError for an unknown name, an unreadable config, or a callable that returns no nn.Module.
    """
    wanted = {"attn_implementation": attention, "experts_implementation": experts}
    options = {name: value for name, value in wanted.items() if value is not None}
    if spec in ZOO:
        entry = ZOO[spec]
        transformers = _transformers(f"model {spec!r}")
        config = getattr(transformers, entry.config_class)(**entry.config)
        return _build(getattr(transformers, entry.model_class), config, device, (dtype, open_dtype), options)
    if spec.endswith(".json") or os.path.sep in spec or Path(spec).exists():
        return _from_config_file(Path(spec), device, (dtype, open_dtype), options)
    if ":" in spec:
        if options:
            raise TraceError(f"{', '.join(options)} can't be set for {spec!r}; set it in the callable")
        return _from_callable(spec, device, dtype)
    raise TraceError(
        f"unknown model {spec!r}{_nearest(spec)}; give a name ({', '.join(ZOO)}), "
        "a path to a config.json, or package.module:callable"
    )


def example_inputs(model: nn.Module, batch: int, seq: int | None = None, *, device: str = "meta") -> Inputs:
    """(args, kwargs) for one step of a model, zeros on `device`.

    Language models get token ids and labels [batch, seq], classifiers labels [batch], vision models pixels
    [batch, channels, height, width] of the config's image size. A model that has a method `example_inputs(batch,
    seq)` is asked. Raises TraceError for any other model, and for a sequence longer than its position embeddings.
    """
    own = getattr(model, "example_inputs", None)
    if callable(own):
        args, kwargs = own(batch, seq)
        return tuple(args), dict(kwargs)
    name, config = type(model).__name__, getattr(model, "config", None)
    build = next((make for suffix, make in _BY_CLASS.items() if name.endswith(suffix)), None)
    if config is None or build is None or not hasattr(model, "main_input_name"):
        raise TraceError(
            f"no example inputs are known for {name}; pass example_inputs=(args, kwargs), "
            "or give the model a method example_inputs(batch, seq) that returns them"
        )
    if model.main_input_name == "pixel_values":
        return (), _image_inputs(config, batch, device)
    if seq is None:
        raise TraceError(f"{name} reads sequences of any length; pass seq=")
    _check_length(model, seq)
    ids = torch.zeros(batch, seq, dtype=torch.long, device=device)
    return (), {"input_ids": ids, "labels": build(batch, seq, device)}


def attention_heads(model: nn.Module) -> tuple[int | None, int | None]:
    """(heads, key-value heads) of a transformers model's attention, by its config; None where that names none."""
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    shared = getattr(config, "num_key_value_heads", None)
    return (heads, shared or heads) if isinstance(heads, int) else (None, None)


def _token_labels(batch: int, seq: int, device: str) -> torch.Tensor:
    return torch.zeros(batch, seq, dtype=torch.long, device=device)


def _class_labels(batch: int, seq: int, device: str) -> torch.Tensor:
    return torch.zeros(batch, dtype=torch.long, device=device)


# The end of a transformers class name -> its labels.
_BY_CLASS: dict[str, Callable[[int, int, str], torch.Tensor]] = {
    "ForCausalLM": _token_labels,
    "LMHeadModel": _token_labels,
    "ForMaskedLM": _token_labels,
    "ForConditionalGeneration": _token_labels,
    "ForTokenClassification": _token_labels,
    "ForSequenceClassification": _class_labels,
    "ForImageClassification": _class_labels,
}


def _image_inputs(config: Any, batch: int, device: str) -> dict[str, Any]:
    size = config.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    pixels = torch.zeros(batch, config.num_channels, height, width, device=device)
    return {"pixel_values": pixels, "labels": torch.zeros(batch, dtype=torch.long, device=device)}


def _check_length(model: nn.Module, seq: int) -> None:
    """Refuse a sequence that runs past a table of learned positions."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe") and seq > module.num_embeddings:
            raise TraceError(f"seq={seq} exceeds the {module.num_embeddings} positions of {name}; use a shorter seq")


def _transformers(wanted_for: str) -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise TraceError(f"{wanted_for} needs transformers ({error}); pip install transformers") from None


def _build(model_class: Any, config: Any, device: str, dtypes: Dtypes, options: dict[str, str]) -> nn.Module:
    wanted, otherwise = dtypes
    dtype = wanted or getattr(config, "dtype", None) or otherwise or torch.float32
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache of keys and values is for generation; training has none
    try:
        with torch.device(device):
            model: nn.Module = model_class._from_config(config, dtype=dtype, **options)
    except Exception as error:  # whatever transformers finds wrong with a config, in many types
        raise TraceError(
            f"transformers cannot build {model_class.__name__}: {_line(error)}; change the config"
        ) from error
    return model.train()


def _from_config_file(path: Path, device: str, dtypes: Dtypes, options: dict[str, str]) -> nn.Module:
    path = path / "config.json" if path.is_dir() else path
    transformers = _transformers(f"config {str(path)!r}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise TraceError(f"cannot read model config {str(path)!r}: {reason}; give a Hugging Face config.json") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise TraceError(f"{str(path)!r} has no model_type; give the config.json of a Hugging Face model")
    try:
        config = transformers.AutoConfig.for_model(**values)
    except Exception as error:  # whatever transformers finds wrong with a config, in many types
        raise TraceError(f"transformers does not accept {str(path)!r}: {_line(error)}; change the config") from error
    return _build(_model_class(transformers, config, str(path)), config, device, dtypes, options)


def _model_class(transformers: ModuleType, config: Any, path: str) -> Any:
    """The class that `architectures` names, else the causal language model of this type of config."""
    names = list(getattr(config, "architectures", None) or [])
    if not names:
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        if type(config) not in mapping:
            raise TraceError(f'{path!r} names no architectures; add the class, such as ["BertForMaskedLM"]')
        return mapping[type(config)]
    found = getattr(transformers, names[0], None)
    if found is None:
        raise TraceError(f"{path!r} asks for {names[0]!r}, which transformers {transformers.__version__} doesn't have")
    return found


def _from_callable(spec: str, device: str, dtype: torch.dtype | None) -> nn.Module:
    module_name, _, attribute = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it; a console script has not
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise TraceError(f"cannot import {module_name!r} for model {spec!r}: {error}") from error
    make = getattr(module, attribute, None)
    if not callable(make):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise TraceError(f"{module_name!r} has no callable {attribute!r}{_nearest(attribute, names)}")
    with torch.device(device):
        model = make()
    if not isinstance(model, nn.Module):
        raise TraceError(f"{spec!r} returned a {type(model).__name__}, not an nn.Module; return the model")
    return model.to(dtype) if dtype is not None else model


def _line(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split())


def _nearest(name: str, known: list[str] | None = None) -> str:
    close = difflib.get_close_matches(name, list(ZOO) if known is None else known, n=3, cutoff=0.4)
    return f" (did you mean {', '.join(close)}?)" if close else ""
