"""Sequences cut over ranks: an unmodified model under a context pin, against the eager model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from autopar.codegen import ring
from autopar.codegen.builder import is_collective
from autopar.codegen.exchange import start_permute
from autopar.errors import VerifyError
from autopar.explaining.text import JOINED
from autopar.pin_mesh import ranks
from autopar.plans import Plan
from autopar.rules.ring import RING, RING_BACKWARD
from autopar.verification import emit_for, verify_program
from tests.models import BATCH, HIDDEN, SEQ, VOCAB, ModelAndInputs, next_token_loss, tiny_bert, tiny_llama
from tests.parity.simulate import Case, assert_equal_to_eager, make_case, planned

LAYOUTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "cp2": ((2,), {"cp": 2}),
    "cp4": ((4,), {"cp": 4}),
    "dp2-cp2": ((2, 2), {"dp": 2, "cp": 2}),
    "cp2-tp2": ((2, 2), {"cp": 2, "tp": 2}),
    "cp4-tp2": ((4, 2), {"cp": 4, "tp": 2}),
    "cp2x2": ((2, 2), {"cp": (2, 2)}),
    "cp2x2-dp2": ((2, 2, 2), {"dp": 2, "cp": (2, 2)}),
}


def padded_llama() -> ModelAndInputs:
    """A Llama with a padding mask: some sequences end early."""
    model, (args, kwargs) = tiny_llama(layers=1)
    mask = torch.ones_like(kwargs["input_ids"])
    mask[1::2, -4:] = 0
    labels = kwargs["labels"].masked_fill(mask == 0, -100)
    return model, (args, {**kwargs, "attention_mask": mask, "labels": labels})


def tiny_gemma3() -> ModelAndInputs:
    """A Gemma 3 of which one layer looks back four tokens, the other to the start."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config).to(torch.float64)
        ids = torch.randint(0, VOCAB, (BATCH, SEQ))
    model.loss_function = next_token_loss
    return model, ((), {"input_ids": ids, "labels": ids.clone()})


def tiny_gpt2() -> ModelAndInputs:
    """A GPT-2: learned positions, tied embeddings, biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=SEQ, n_embd=HIDDEN, n_layer=1, n_head=8, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).to(torch.float64)
        ids = torch.randint(0, VOCAB, (BATCH, SEQ))
    model.loss_function = next_token_loss
    return model, ((), {"input_ids": ids, "labels": ids.clone()})


def written_out(made: ModelAndInputs) -> ModelAndInputs:
    """The same model with every score written out, as transformers calls eager."""
    made[0].set_attn_implementation("eager")  # type: ignore[operator]
    return made


MODELS: dict[str, Callable[[], ModelAndInputs]] = {
    "llama": lambda: tiny_llama(layers=1),
    "grouped": lambda: tiny_llama(layers=1, kv_heads=2),
    "padded": padded_llama,
    "gemma3": tiny_gemma3,
    "gpt2": tiny_gpt2,
    "grouped-eager": lambda: written_out(tiny_llama(layers=1, kv_heads=2)),
    "padded-eager": lambda: written_out(padded_llama()),
    "gemma3-eager": lambda: written_out(tiny_gemma3()),
    "gpt2-eager": lambda: written_out(tiny_gpt2()),
    "bert-eager": lambda: written_out(tiny_bert(layers=1)),
}
RINGS = ("llama", "grouped", "grouped-eager", "gpt2-eager")
QUICK = {("llama", layout) for layout in LAYOUTS if layout != "cp2x2-dp2"} | {
    ("gemma3", "cp2"),
    ("padded", "cp2"),
    ("grouped", "cp2"),
    ("grouped-eager", "cp4"),
    ("gpt2-eager", "cp4"),
}


@cache
def case(name: str) -> Case:
    """Traced and trained once for all tests."""
    return make_case(*MODELS[name]())


def lowerings(plan: Plan) -> set[str]:
    """All that the plan uses."""
    return {rule.lowering for decision in plan.decisions.nodes.values() for rule in decision.rules}


def cases() -> Iterator[Any]:
    """All models in all layouts, most of them slow."""
    for name, layout in itertools.product(MODELS, LAYOUTS):
        marks = () if (name, layout) in QUICK else (pytest.mark.slow,)
        yield pytest.param(name, layout, marks=marks, id=f"{name}-{layout}")


@pytest.mark.parametrize(("name", "layout"), list(cases()))
def test_context_parallel(name: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, pin = LAYOUTS[layout]
    plan = planned(case(name), mesh, monkeypatch, pin=pin)
    assert {role: plan.layout()[role] for role in pin} == {role: ranks(sizes) for role, sizes in pin.items()}
    if name in RINGS and len(mesh) == len(pin):  # for the others, and on two axes, cutting heads may be cheaper
        assert {RING, RING_BACKWARD} <= lowerings(plan)
    assert_equal_to_eager(case(name), plan)


@pytest.mark.parametrize("layout", ["cp2", "cp4"])
def test_only_parameters_are_gathered(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the sequence nor the vocabulary is ever whole on a rank: not in the logits, not in the loss."""
    mesh, pin = LAYOUTS[layout]
    of = case("llama")
    emitted = emit_for(of.traced, planned(of, mesh, monkeypatch, pin=pin))
    nodes = [n for graph in (emitted.forward, emitted.backward) for n in graph.nodes if is_collective(n)]
    gathered = {n.meta["origin"] for n in nodes if "all_gather" in str(n.target)}
    assert gathered <= {param.node for param in of.traced.params}
    assert any(n.target is start_permute for n in nodes)


@pytest.mark.parametrize("name", ["grouped-eager", "gpt2-eager", pytest.param("gemma3-eager", marks=pytest.mark.slow)])
def test_written_out_attention_keeps_no_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank holds a number for every pair of tokens, nor for all pairs of its own with all; the report says why."""
    of = case(name)
    plan = planned(of, (4,), monkeypatch, pin={"cp": 4})
    emitted = emit_for(of.traced, plan)
    made = [n.meta["val"] for graph in (emitted.forward, emitted.backward) for n in graph.nodes if "val" in n.meta]
    shapes = {tuple(v.shape[-2:]) for v in made if isinstance(v, torch.Tensor) and v.dim() == 4}
    assert shapes and not shapes & {(SEQ, SEQ), (SEQ // 4, SEQ)}
    said, layers = str(replace(plan.explain(), solves=False)), of.model.config.num_hidden_layers
    assert f"{JOINED}: {layers} times" in said and "context parallel" in said
    if name in RINGS:  # with a window, cutting heads may be cheaper
        assert any(n.target is start_permute for n in emitted.forward.nodes)


def test_verify_names_a_ring_that_takes_blocks_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    of = case("llama")
    plan = planned(of, (4,), monkeypatch, pin={"cp": 4})
    verify_program(of.traced, plan.decisions, emit_for(of.traced, plan), of.values)
    right = ring.starts_of
    monkeypatch.setattr(ring, "starts_of", lambda coord, hop, *rest: right(coord, -hop, *rest))
    with pytest.raises(VerifyError, match="flash_attention"):
        verify_program(of.traced, plan.decisions, emit_for(of.traced, plan), of.values)
