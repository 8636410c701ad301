"""One rank of tests/parity/test_stages.py: trains models whose plans have pipeline stages, alone and by autopar.

    torchrun --nproc-per-node 4 (8 for those in MIXED) tests/parity/gloo_stages.py FOLDER CASE...

Writes FOLDER/RANK.json: per case, the largest relative differences and the parameters whose gradients are here; and
FOLDER/CASE/, a checkpoint with the optimizer's state after all steps.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

import autopar
import autopar.api
from autopar.api import trace
from autopar.errors import RuntimeFailure
from autopar.verification import gradient_errors, relative_error
from tests.families import causal
from tests.models import HIDDEN, VOCAB, ModelAndInputs, tiny_llama
from tests.parity.gloo_ranks import Facts, full, loss_of
from tests.pipeline.models import DEEP
from tests.widen import WidenCasts, widened

STEPS, LR, MAX_NORM = 3, 1e-2, 0.5


def tied_gpt2(layers: int = 4) -> ModelAndInputs:
    """GPT-2, whose head is its embedding."""
    return causal(
        "GPT2LMHeadModel", vocab_size=VOCAB, n_embd=HIDDEN, n_layer=layers, n_head=8, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )()  # fmt: skip


MIXED: dict[str, tuple[Callable[[], ModelAndInputs], dict[str, Any]]] = {  # on eight processes
    "sequence-parallel": (tiny_llama, {"pp": 2, "dp": 2, "tp": 2, "sp": True, "zero": 1, "micro_batch": 2}),
    "ring": (tiny_llama, {"pp": 2, "cp": 2, "tp": 2, "micro_batch": 4, "recompute": "full"}),
    "zero3": (lambda: tied_gpt2(2), {"pp": 2, "dp": 4, "zero": 3, "micro_batch": 1, "schedule": "zero-bubble"}),
    "encoder-decoder": (
        lambda: DEEP["t5"](2)(), {"pp": 2, "dp": 2, "tp": 2, "micro_batch": 2, "cut": "decoder.block.0"}),
    "images": (lambda: DEEP["resnet"](0)(), {"pp": 4, "dp": 2, "zero": 2, "micro_batch": 4}),
    "unlike-stages": (lambda: tied_gpt2(2), {"pp": 2, "dp": (2, 4), "tp": (2, 1), "zero": 1, "micro_batch": 1}),
    "experts": (lambda: DEEP["mixtral"](2)(), {"pp": 2, "dp": 4, "ep": 2, "micro_batch": 1}),
    "experts-context": (lambda: DEEP["mixtral"](2)(), {"pp": 2, "dp": 2, "cp": 2, "ep": 2, "micro_batch": 2}),
}  # fmt: skip
CASES: dict[str, tuple[Callable[[], ModelAndInputs], dict[str, Any]]] = {
    **MIXED,
    "llama": (
        lambda: tiny_llama(layers=4),
        {"pp": 2, "tp": 2, "micro_batch": 2, "sp": True, "offload": "optimizer"},
    ),
    "gpt2": (tied_gpt2, {"pp": 2, "dp": 2, "zero": 1, "micro_batch": 1, "schedule": "zero-bubble"}),
    "interleaved": (
        lambda: tiny_llama(layers=4, tied=True),
        {"pp": 2, "dp": 2, "zero": 3, "micro_batch": 1, "vpp": 2, "recompute": "selective"},
    ),
    "deep": (lambda: tiny_llama(layers=4), {"pp": 4, "micro_batch": 1, "schedule": "gpipe", "recompute": "full"}),
}


EVALUATED = ("deep", "images")  # in evaluation mode, too, for which a program is made of its own


def local_cluster() -> autopar.ClusterSpec:
    """What torchrun started, with a host that has room for the optimizer's state."""
    local = autopar.ClusterSpec.local()
    device = dataclasses.replace(local.device, host_link_bytes_per_s=1e10)
    return dataclasses.replace(local, device=device, host_memory_bytes=1 << 34)


def adamw(module: nn.Module) -> torch.optim.AdamW:
    """The optimizer of both sides."""
    return torch.optim.AdamW(module.parameters(), lr=LR)


def trained_both(name: str, folder: Path) -> Facts:
    """A few AdamW steps on each side; the program's optimizer is made before there is a plan."""
    make, pin = CASES[name]
    model, (args, kwargs) = make()
    copied = copy.deepcopy(model)
    if "ep" in pin:  # experts as grouped products, which outside of a capture have no kernel in float64
        copied.config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]
    program = autopar.compile(copied, local_cluster(), pin=pin)
    mine, theirs = adamw(program), adamw(model)
    facts: Facts = {"loss": 0.0, "gradient": 0.0, "norm": 0.0}
    for _ in range(STEPS):
        loss = program.train_step(*args, **kwargs)
        with WidenCasts():
            expected = loss_of(model(*args, **kwargs))
            expected.backward()
        held = {n: p for n, p in program.named_parameters() if p.grad is not None}
        wanted = {n: p.grad for n, p in model.named_parameters() if n in held and p.grad is not None}
        facts["loss"] = max(facts["loss"], relative_error(loss, expected))
        errors = gradient_errors({n: full(p.grad) for n, p in held.items()}, wanted)
        facts["gradient"] = max(facts["gradient"], *errors.values())
        norms = program.clip_grad_norm_(MAX_NORM), nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        facts["norm"] = max(facts["norm"], relative_error(*norms))
        for optimizer in (mine, theirs):
            optimizer.step()
            optimizer.zero_grad()
    facts["parameter"] = parameter_error(program, model)
    buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    facts["buffer"] = max([0.0, *(relative_error(program.get_buffer(n), b) for n, b in buffers.items())])
    facts["held"] = sorted(held)
    facts["state dict keys"] = list(program.state_dict()) == list(model.state_dict())
    facts["optimizer has no more"] = {id(p) for p in mine.state} == {id(p) for p in held.values()}
    facts["refuses a call"] = refuses(program, args, kwargs)
    facts["on the host as asked"] = program.plan.layout().get("offload", "none") == pin.get("offload", "none")
    for mode in (True, False)[: 2 if name in EVALUATED else 1]:
        facts["evaluation" if mode else "evaluation mode"] = evaluated_both(
            program.train(mode), model.train(mode), (args, kwargs)
        )
    dcp.save({"model": program.state_dict(), "optimizer": get_optimizer_state_dict(program, mine)},
             checkpoint_id=folder / name)  # fmt: skip
    return facts


def evaluated_both(program: nn.Module, model: nn.Module, call: Any) -> float:
    """The relative difference of the losses without gradients."""
    args, kwargs = call
    with torch.no_grad(), WidenCasts():
        expected = loss_of(model(*args, **kwargs))
    with torch.no_grad():
        return relative_error(loss_of(program(*args, **kwargs)), expected)


def parameter_error(program: nn.Module, model: nn.Module) -> float:
    """The largest relative difference of any parameter that is stored here."""
    mine = {n: p for n, p in program.named_parameters() if is_here(p)}
    expected = {n: p.detach() for n, p in model.named_parameters() if n in mine}
    return max(gradient_errors({n: full(p) for n, p in mine.items()}, expected).values())


def is_here(param: nn.Parameter) -> bool:
    """Whether this rank is among those that store a parameter; what others store has no elements here."""
    assert isinstance(param, DTensor)
    here = param.device_mesh.get_coordinate() is not None
    assert here or param.to_local().numel() == 0
    return here


def refuses(program: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a program with stages says what to call instead of itself."""
    try:
        program(*args, **kwargs)
    except RuntimeFailure as error:
        return "call program.train_step" in str(error)
    return False


def main() -> None:
    """Run the cases one after the other and write what was found."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    autopar.api.trace = lambda model, call: widened(trace(model, call))  # type: ignore[assignment]
    facts = {name: trained_both(name, folder) for name in sys.argv[2:]}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.barrier()  # by then torch's threads have let go of tensors, which they must not do while Python ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
