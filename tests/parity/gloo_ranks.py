"""One rank of tests/parity/test_gloo.py: trains Llama, BERT and an MLP, alone and by autopar, and compares.

    torchrun --nproc-per-node 4 tests/parity/gloo_ranks.py FOLDER

FOLDER holds plain/ (a checkpoint of `other_bert()`); this writes FOLDER/RANK.json (largest relative
differences and facts) and FOLDER/program/ (a checkpoint of BERT and its optimizer after three steps).
"""

from __future__ import annotations

import copy
import json
import sys
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
from autopar.verification import gradient_errors, relative_error
from tests.models import ModelAndInputs, tiny_bert, tiny_llama, tiny_mlp
from tests.widen import WidenCasts, widened

STEPS, CHECKPOINT_STEP = 5, 3
LR, MAX_NORM = 1e-2, 0.5

Facts = dict[str, Any]


def adamw(module: nn.Module) -> torch.optim.AdamW:
    """The optimizer of both sides."""
    return torch.optim.AdamW(module.parameters(), lr=LR)


def other_bert() -> ModelAndInputs:
    """The BERT of the plain checkpoint: other weights, other data."""
    return tiny_bert(layers=1, seed=1)


def loss_of(result: Any) -> torch.Tensor:
    """The loss in a model's result."""
    return result if isinstance(result, torch.Tensor) else result["loss"]


def full(tensor: Any) -> torch.Tensor:
    """The whole tensor, if it is cut."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def step(module: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any) -> dict[str, Any]:
    """One step with clipping: loss, gradients before clipping, and their norm."""
    loss = loss_of(module(*inputs[0], **inputs[1]))
    loss.backward()
    grads = {name: full(p.grad) for name, p in module.named_parameters() if p.grad is not None}
    norm = full(nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM))
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.detach(), "grads": grads, "norm": norm}


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Any) -> dict[str, Any]:
    """The same on one device."""
    with WidenCasts():
        return step(model, optimizer, inputs)


def parameter_error(program: nn.Module, model: nn.Module) -> float:
    """The largest relative difference of any parameter, on the scale of `gradient_errors` (biases may stay near 0)."""
    mine = dict(program.named_parameters())
    expected = {name: p.detach() for name, p in model.named_parameters()}
    return max(gradient_errors({name: full(mine[name]) for name in expected}, expected).values())


def train_both(program: nn.Module, model: nn.Module, inputs: Any, folder: Path | None = None) -> Facts:
    """Five steps on each side. The optimizer of the program is made before its first call, so before it is planned."""
    mine, theirs = adamw(program), adamw(model)
    before = [id(p) for p in program.parameters()]
    facts: Facts = {"loss": 0.0, "gradient": 0.0, "norm": 0.0}
    for number in range(STEPS):
        found, expected = step(program, mine, inputs), plain_step(model, theirs, inputs)
        facts["loss"] = max(facts["loss"], relative_error(found["loss"], expected["loss"]))
        assert found["grads"].keys() == expected["grads"].keys()
        errors = gradient_errors(found["grads"], expected["grads"])
        facts["gradient"] = max(facts["gradient"], *errors.values())
        facts["norm"] = max(facts["norm"], relative_error(found["norm"], expected["norm"]))
        if folder is not None and number + 1 == CHECKPOINT_STEP:
            state = {"model": program.state_dict(), "optimizer": get_optimizer_state_dict(program, mine)}
            dcp.save(state, checkpoint_id=folder)
    facts["parameter"] = parameter_error(program, model)
    facts["parameters stay the same objects"] = before == [id(p) for p in program.parameters()]
    facts["state dict keys"] = list(program.state_dict()) == list(model.state_dict())
    facts["cut"] = sum(not p.is_replicated for p in placements(program))
    facts["optimizer state is cut alike"] = all(
        mine.state[p]["exp_avg"].placements == p.placements for p in program.parameters() if p in mine.state
    )
    return facts


class Placed:
    """A parameter's placements."""

    def __init__(self, tensor: DTensor) -> None:
        self.is_replicated = all(p.is_replicate() for p in tensor.placements)


def placements(program: nn.Module) -> list[Placed]:
    """Of all parameters of a program; fails where one is no DTensor."""
    parameters = list(program.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    return [Placed(p) for p in parameters]


def llama(folder: Path) -> Facts:
    """Data and tensor parallel."""
    model, inputs = tiny_llama(layers=1)
    program = autopar.compile(copy.deepcopy(model), autopar.ClusterSpec.local(), pin={"dp": 2, "tp": 2})
    return train_both(program, model, inputs)


def bert(folder: Path) -> Facts:
    """Tensor parallel on one axis; checkpoints both ways."""
    model, inputs = tiny_bert(layers=1)
    program = autopar.compile(copy.deepcopy(model), autopar.ClusterSpec.local(), pin={"tp": 4})
    facts = train_both(program, model, inputs, folder / "program")
    other, other_inputs = other_bert()
    expected = loss_of(other(**other_inputs[1]))
    state = program.state_dict()
    dcp.load({"model": state}, checkpoint_id=folder / "plain")
    program.load_state_dict(state)
    facts["loss from plain checkpoint"] = relative_error(loss_of(program(**other_inputs[1])), expected)
    program.load_state_dict(model.state_dict())
    facts["loss from plain state dict"] = relative_error(loss_of(program(**inputs[1])), loss_of(model(**inputs[1])))
    return facts


def mlp(folder: Path) -> Facts:
    """Fully sharded data parallel; train_step, another batch shape, evaluation."""
    model, inputs = tiny_mlp()
    program = autopar.compile(copy.deepcopy(model), autopar.ClusterSpec.local(), pin={"dp": 4, "zero": 3})
    facts = train_both(program, model, inputs)
    held = [p.placements for p in program.parameters()]
    half = ((inputs[0][0][:4],), {**inputs[1], "target": inputs[1]["target"][:4]})
    for name, call in (("train_step", inputs), ("half a batch", half)):
        loss = program.train_step(*call[0], **call[1])
        expected = loss_of(model(*call[0], **call[1]))
        expected.backward()
        found = {n: full(p.grad) for n, p in program.named_parameters()}
        errors = gradient_errors(found, {n: p.grad for n, p in model.named_parameters()})
        facts[name] = max(relative_error(loss, expected), *errors.values())  # gradients add up over both calls
    with torch.no_grad():
        found, expected = program.eval()(*inputs[0], **inputs[1]), model.eval()(*inputs[0], **inputs[1])
    facts["evaluation"] = relative_error(full(found["logits"]), expected["logits"])
    facts["evaluation has no graph"] = not loss_of(found).requires_grad
    facts["parameters stay where they are"] = held == [p.placements for p in program.parameters()]
    facts["other outputs"] = found["name"] == "mlp" and torch.equal(full(found["aux"][0]), expected["aux"][0])
    return facts


def main() -> None:
    """Run the models one after the other and write what was found."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    autopar.api.trace = lambda model, call: widened(trace(model, call))  # type: ignore[assignment]
    facts = {check.__name__: check(folder) for check in (mlp, bert, llama)}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
