"""Joint graphs of small models, with real values at every node."""

from __future__ import annotations

import contextlib
import warnings
from functools import cache
from typing import Any

import torch
import transformers
from torch import fx, nn
from torch._dynamo.functional_export import dynamo_graph_capture_for_export
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

from tests.rules.harness import Recorder

BATCH, SEQUENCE, VOCABULARY, HIDDEN = 4, 8, 32, 16


class LossOf(nn.Module):
    """A transformers model that returns its loss only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs).loss


class Mlp(nn.Module):
    """Two layers and a mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.down(torch.relu(self.up(x))), y)


def _sizes(attention: str) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "attn_implementation": attention,
    }


def _model(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    if name == "mlp":
        x = torch.randn(BATCH, HIDDEN, dtype=torch.float64)
        return Mlp().double(), {"x": x, "y": torch.randn_like(x)}
    family, _, attention = name.partition("-")
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))
    labels = tokens.clone()
    labels[0, 3:] = -100
    if family == "llama":
        llama = transformers.LlamaConfig(num_key_value_heads=2, use_cache=False, **_sizes(attention))
        return LossOf(transformers.LlamaForCausalLM(llama).double()), {"input_ids": tokens, "labels": labels}
    if family == "mixtral":
        sizes = _sizes("sdpa") | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "experts_implementation": "batched_mm",
        }
        mixtral = transformers.MixtralConfig(num_key_value_heads=2, use_cache=False, **sizes)
        return LossOf(transformers.MixtralForCausalLM(mixtral).double()), {"input_ids": tokens, "labels": labels}
    if family == "mamba":
        mamba = transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, state_size=4, num_hidden_layers=1, use_cache=False
        )
        return LossOf(transformers.MambaForCausalLM(mamba).double()), {"input_ids": tokens, "labels": labels}
    bert = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_sizes(attention))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    inputs = {"input_ids": tokens, "labels": labels, "attention_mask": mask}
    return LossOf(transformers.BertForMaskedLM(bert).double()), inputs


NAMES = ("mlp", "llama-eager", "llama-sdpa", "bert-eager", "bert-sdpa")
MORE_NAMES = ("mixtral", "mamba")


@cache
def recorded(name: str) -> tuple[fx.Node, ...]:
    """The cases of a model in NAMES."""
    return record(*_model(name))


def record(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[fx.Node, ...]:
    """A case per distinct op of a model's joint graph, its operands being what the model computes there."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        captured = dynamo_graph_capture_for_export(model)(**inputs)
        joint = aot_export_joint_with_descriptors(stack, captured, (), inputs).graph_module
    state = dict(captured.named_parameters(remove_duplicate=False))  # tied ones are arguments of their own
    state |= dict(captured.named_buffers(remove_duplicate=False))
    recorder = Recorder(joint)
    with torch.no_grad():
        recorder.run(*_arguments(joint, state, inputs))
    return tuple(recorder.cases.values())


def _arguments(joint: fx.GraphModule, state: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> list[Any]:
    """The joint graph's arguments: parameters and buffers, inputs, and the tangent of the loss."""
    values = [t.detach() for t in state.values()] + list(inputs.values())
    metas = [n.meta["val"] for n in joint.graph.nodes if n.op == "placeholder"]
    values += [torch.ones(tuple(m.shape), dtype=m.dtype) for m in metas[len(values) :]]
    assert [tuple(m.shape) for m in metas] == [tuple(v.shape) for v in values], "the joint graph takes something else"
    return values
