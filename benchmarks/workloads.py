"""The models of `throughput.py`, and the parallel versions of them that a person would write with torch.

Sizes are small but bound by compute on a CPU core: a step takes some hundred milliseconds, its hundreds of
ops some milliseconds of Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """A model to train, its global batch, and what a person needs to know to make it parallel.

    layers: the modules that FSDP2 shards and checkpointing reruns one by one. tensor_parallel: the plan of
    `parallelize_module` by module name; None where torch has no such plan for this kind of model.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    samples: int
    layers: Callable[[nn.Module], list[nn.Module]]
    tensor_parallel: dict[str, Any] | None


def llama() -> nn.Module:
    """A Llama of 4 layers, 10 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=128, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    """A BERT of 4 layers for masked language modelling, without dropout, 8 million parameters."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=2048, hidden_size=384, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=6,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForMaskedLM(config)


class Block(nn.Module):
    """Two convolutions with batch norm and a shortcut (He et al. 2016); the first may halve the image."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, channels_in, height, width]."""
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet of six blocks on images of 32 x 32, with its loss; 2.7 million parameters."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        shapes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
        self.blocks = nn.ModuleList(Block(*shape) for shape in shapes)
        self.head = nn.Linear(256, classes)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """images: [batch, 3, 32, 32]; labels: [batch]."""
        x = torch.relu(self.bn(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def resnet_batch() -> Batch:
    """32 images of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 32, 32, generator=generator)
    return {"images": images, "labels": torch.randint(0, 100, (32,), generator=generator)}


def llama_batch() -> Batch:
    """16 sequences of 128 tokens."""
    ids = torch.randint(0, 2048, (16, 128), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def bert_batch() -> Batch:
    """16 sequences of 128 tokens, some padded, a label on every seventh."""
    ids = llama_batch()["input_ids"]
    mask = torch.ones_like(ids)
    mask[1::2, -16:] = 0
    labels = torch.where((torch.arange(128) % 7 == 0) & (mask == 1), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _bert_tensor_parallel() -> dict[str, Any]:
    plan: dict[str, Any] = {"cls.predictions.decoder": ColwiseParallel(output_layouts=Replicate())}
    for name in ("query", "key", "value"):
        plan[f"bert.encoder.layer.*.attention.self.{name}"] = ColwiseParallel()
    plan["bert.encoder.layer.*.attention.output.dense"] = RowwiseParallel()
    plan["bert.encoder.layer.*.intermediate.dense"] = ColwiseParallel()
    plan["bert.encoder.layer.*.output.dense"] = RowwiseParallel()
    return plan


def _llama_tensor_parallel() -> dict[str, Any]:
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    return plan


WORKLOADS = {
    "llama": Workload(llama, llama_batch, 16, lambda m: list(m.model.layers), _llama_tensor_parallel()),
    "bert": Workload(bert, bert_batch, 16, lambda m: list(m.bert.encoder.layer), _bert_tensor_parallel()),
    "resnet": Workload(ResNet, resnet_batch, 32, lambda m: list(m.blocks), None),
}


# -- by hand ----------------------------------------------------------------------------------------------------


def rows(batch: Batch, rank: int, world: int) -> Batch:
    """This rank's share of the batch."""
    return {name: x.chunk(world)[rank] for name, x in batch.items()}


def data_parallel(model: nn.Module, mesh: DeviceMesh, work: Workload) -> nn.Module:
    """DDP; gradients are views of the buckets, as torch recommends. A batch norm in the model sees a rank's share of
    the batch only: the model is then another function than on one device."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether every rank's own share of a batch gives other numbers than the whole batch."""
    return any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def sharded(model: nn.Module, mesh: DeviceMesh, work: Workload) -> nn.Module:
    """FSDP2: each layer, then the rest."""
    for layer in work.layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_and_checkpointed(model: nn.Module, mesh: DeviceMesh, work: Workload) -> nn.Module:
    """FSDP2 with every layer rerun in the backward pass."""
    chosen = set(map(id, work.layers(model)))
    apply_activation_checkpointing(model, check_fn=lambda m: id(m) in chosen)
    return sharded(model, mesh, work)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh, work: Workload) -> nn.Module:
    """Megatron's columns then rows, with the layers of torch.distributed.tensor.parallel."""
    assert work.tensor_parallel is not None
    return parallelize_module(model, mesh, work.tensor_parallel)
