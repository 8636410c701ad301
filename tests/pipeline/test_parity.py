"""Pipelines of all schedules, every rank simulated, against the single device on the whole batch.

The quick set has each thing once; the slow set has all families in two and four stages on all meshes of a stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from autopar.codegen.stage_nodes import stages_by_blocks, stages_by_cuts
from autopar.errors import LayoutError
from tests.pipeline.models import DEEP, MICRO_BATCHES_OF, dropping_gpt2
from tests.pipeline.staged import Cut, Whole, staged

TIME_LIMIT_S = 10.0  # parity does not need the best plan
MESHES = [(), (2,), (2, 2)]
SCHEDULES = ["1f1b", "gpipe", "zero-bubble", "interleaved"]


@cache
def whole(name: str, layers: int) -> Whole:
    return Whole.of(*DEEP[name](layers)())


@cache
def llama() -> Cut:
    """In two stages, for four micro-batches."""
    with pytest.MonkeyPatch.context() as patch:
        return staged(whole("llama", 2), [1, 1], (), 4, patch)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero-bubble"])
def test_llama_in_two_stages(schedule: str) -> None:
    llama().verify(schedule, 2)


def test_tied_embeddings_interleaved_on_sharded_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stage has its own summand of their gradient: none travels with a micro-batch."""
    cut = staged(whole("gpt2", 4), [1, 1, 1, 1], (2,), 4, monkeypatch)
    tied = "transformer.wte.weight"
    users = [s.index for s in cut.program.stages if tied in s.params]
    makers = [s.index for s in cut.program.stages if tied in (*s.grads_early, *s.grads_late)]
    assert users == makers == [0, 3]
    assert cut.program.owners[tied] == 0
    assert [len(s.sends_forward.values) for s in cut.program.stages] == [1, 1, 1, 0]
    assert [len(s.sends_backward.values) for s in cut.program.stages] == [0, 1, 1, 1]
    cut.verify("interleaved", 2)


def test_encoder_and_decoder_with_unequal_token_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder's result goes through the decoder's first stage to its second; one micro-batch has no labels."""
    model, call = DEEP["t5"](3)()
    labels = call[1]["labels"].clone()
    labels[0, 3:], labels[2:4, 5:], labels[6:] = -100, -100, -100
    cut = staged(Whole.of(model, ((), {**call[1], "labels": labels})), [1, 1, 1], (), 4, monkeypatch)
    case = cut.case()
    assert [round(w * 61) for w in case.weights] == [19, 10, 32, 0]
    assert len(cut.program.stages[1].sends_forward.values) > 1
    cut.verify("1f1b", 3, case)


def test_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    staged(Whole.of(*dropping_gpt2()), [1, 1], (2,), 2, monkeypatch).verify("zero-bubble", 2)


def test_batch_norms_in_one_micro_batch_cut_inside_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """New values of buffers are made where their module runs; a skip connection crosses the second cut."""

    def cuts(traced: Any) -> Any:
        return stages_by_cuts(traced, ["layer1.1", "layer2.0.conv2"])

    cut = staged(whole("resnet", 0), cuts, (2,), 1, monkeypatch)
    buffers = {node: fqn for fqn, node in cut.traced.buffer_updates.items()}
    made = [{buffers[o].partition(".bn")[0] for o in s.outputs if o in buffers} for s in cut.program.stages]
    assert "layer1.0" in made[0] and "layer1.1" in made[1] and "layer2.0" in made[1] & made[2]
    assert len(cut.program.stages[1].sends_forward.values) == 2
    cut.verify("1f1b", 3)


@pytest.mark.parametrize(
    "pin",
    [
        {"dp": 2, "zero": 2},
        pytest.param({"dp": 2, "zero": 3, "recompute": "full"}, marks=pytest.mark.slow),
        pytest.param({"dp": 2, "tp": 2, "sp": True, "recompute": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layouts_of_a_stage(pin: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What one stage runs again in its backward pass it has from itself: the messages are those of any layout."""
    mesh = (2, 2) if "tp" in pin else (2,)
    cut = staged(whole("llama", 2), [1, 1], mesh, 2, monkeypatch, pin=pin, reduce_each=pin.get("zero", 0) > 1)
    assert [len(s.sends_forward.values) for s in cut.program.stages] == [1, 0]
    assert [len(s.sends_backward.values) for s in cut.program.stages] == [0, 1]
    messages = [m for s in cut.program.stages for m in (s.sends_forward, s.sends_backward)]
    assert all(tensor.is_contiguous() for message in messages for tensor in message.tensors)
    cut.verify("1f1b", 2)


def cases() -> Iterator[Any]:
    """Families, stages and meshes, with schedules by turns."""
    turns = itertools.cycle(SCHEDULES)
    for name, stages, mesh in itertools.product(DEEP, (2, 4), MESHES):
        schedule = next(turns)
        if name != "resnet":
            yield pytest.param(
                name, stages, mesh, schedule, id=f"{name}-{stages}-{'x'.join(map(str, mesh))}-{schedule}"
            )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stages", "mesh", "schedule"), list(cases()))
def test_families(
    name: str, stages: int, mesh: tuple[int, ...], schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = stages
    if schedule == "interleaved":
        schedule, ranks = ("interleaved", 2) if stages == 4 else ("1f1b", 2)
    micro_batches = MICRO_BATCHES_OF[len(mesh)]
    cut = staged(whole(name, 4), [4 // stages] * stages, mesh, micro_batches, monkeypatch, time_limit_s=TIME_LIMIT_S)
    assert all(len(s.sends_backward.values) <= 3 for s in cut.program.stages)
    cut.verify(schedule, ranks)


# -- cuts that cannot be made ---------------------------------------------------------------


def test_blocks_that_the_model_has_not() -> None:
    said = r"stages of 2, 1 blocks don't add up to the model's 2 \(model.layers.0 to model.layers.1\)"
    with pytest.raises(LayoutError, match=said):
        stages_by_blocks(whole("llama", 2).traced, [2, 1])


def test_a_cut_at_a_module_that_does_not_run() -> None:
    with pytest.raises(LayoutError, match=r"no op runs in a module 'model.layers.7', at which a stage should begin"):
        stages_by_cuts(whole("llama", 2).traced, ["model.layers.7"])


def test_stages_without_blocks() -> None:
    """Embedding first and head last may have stages of their own."""
    cut = llama().again(stages_by_blocks(llama().traced, [0, 2, 0]))
    assert cut.program.owners["lm_head.weight"] == 2
    assert cut.program.stages[0].params == ("model.embed_tokens.weight",)
    cut.verify("1f1b", 3)
