"""Builds the models and clusters that `published_rows.py` read, on the meta device, through transformers configs."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import torch
from torch import nn

from autopar.cluster import ClusterSpec, DeviceSpec
from autopar.layouts import Layout, check_layout, parse_layout
from autopar.predicting.run import Run
from benchmarks.published_rows import GIB, Case, Dims, Machine


def build(dims: Dims) -> nn.Module:
    """The model of these sizes: a Llama if its products are gated, else a GPT-2, with ALiBi a BLOOM."""
    import transformers

    if dims.gated:
        config = _llama(dims)
        model_class = transformers.LlamaForCausalLM
    elif dims.alibi:
        if dims.attention != "eager" or dims.ffn != 4 * dims.hidden:
            raise ValueError(f"a BLOOM has unfused attention and ffn = 4 * hidden, not {dims}")
        config = _bloom(dims)
        model_class = transformers.BloomForCausalLM
    else:
        config = _gpt(dims)
        model_class = transformers.GPT2LMHeadModel
    options = {} if dims.alibi else {"attn_implementation": dims.attention}
    with torch.device("meta"):
        model: nn.Module = model_class._from_config(config, dtype=getattr(torch, dims.dtype), **options)
    return model.train()


def _llama(dims: Dims) -> object:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=dims.hidden,
        intermediate_size=dims.ffn,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads,
        vocab_size=dims.vocab,
        max_position_embeddings=dims.seq,
        tie_word_embeddings=dims.tied,
        attention_dropout=dims.dropout if dims.attention == "eager" else 0.0,
        use_cache=False,
    )


def _gpt(dims: Dims) -> object:
    """Dropout as the framework has it; a fused attention has none, as in the runs that used one."""
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=dims.hidden,
        n_inner=dims.ffn,
        n_layer=dims.layers,
        n_head=dims.heads,
        n_positions=dims.seq,
        vocab_size=dims.vocab,
        activation_function="gelu",
        tie_word_embeddings=dims.tied,
        attn_pdrop=dims.dropout if dims.attention == "eager" else 0.0,
        resid_pdrop=dims.dropout,
        embd_pdrop=dims.dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )


def _bloom(dims: Dims) -> object:
    from transformers import BloomConfig

    return BloomConfig(
        hidden_size=dims.hidden, n_layer=dims.layers, n_head=dims.heads, vocab_size=dims.vocab, use_cache=False
    )


def cluster_of(machine: Machine) -> ClusterSpec:
    """The preset, with what the machine has different."""
    cluster = ClusterSpec.preset(machine.preset, gpus=machine.gpus, inter_node_gbit_per_s=machine.gbit_per_s)
    device = cluster.device
    if machine.memory_gib is not None:
        device = dataclasses.replace(device, memory_bytes=int(machine.memory_gib * GIB))
    if machine.memory_bytes_per_s is not None:
        device = dataclasses.replace(device, memory_bytes_per_s=machine.memory_bytes_per_s)
    if machine.power_share != 1.0:
        device = _throttled(device, machine.power_share)
    return dataclasses.replace(cluster, device=device)


def _throttled(device: DeviceSpec, power_share: float) -> DeviceSpec:
    """A device at a power limit: power goes with clock times voltage squared, and voltage with the clock."""
    clock = power_share ** (1 / 3)
    return dataclasses.replace(
        device,
        matmul_efficiency_fraction=device.matmul_efficiency_fraction * clock,
        attention_forward_fraction=device.attention_forward_fraction * clock,
        attention_backward_fraction=device.attention_backward_fraction * clock,
        attention_efficiency_fraction=device.attention_efficiency_fraction * clock,
    )


def layout_of_case(case: Case) -> Layout:
    """The layout of a case; LayoutError where its model cannot be cut that way."""
    dims, layout = case.dims, parse_layout(case.layout, case.machine.gpus)
    cut = {"blocks": dims.layers, "heads": dims.heads, "kv_heads": dims.kv_heads, "seq": dims.seq}
    check_layout(layout, global_batch=case.global_batch, **cut)
    return layout


def run_of_case(case: Case) -> Run:
    """How the framework of a case runs a layout."""
    return replace(Run.usual(keeps_scores=case.dims.attention == "eager"), **dict(case.run))
