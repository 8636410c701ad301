"""torch's own context parallel on CPUs, as far as it goes: its ring and its load balancing, with the CPU's kernel.

`torch.distributed.tensor.experimental.context_parallel` replaces three attention ops of GPUs by a ring. The one that
CPUs use is not among them, so it stops there (`context_parallel_error`). The ring takes any op; here it is called
with the CPU's, from an attention function of transformers. Gradients are averaged over ranks in one message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import _attention as ring
from torch.distributed.tensor.experimental._context_parallel import _attention as template
from torch.distributed.tensor.experimental._context_parallel._load_balancer import _create_default_load_balancer
from transformers import AttentionInterface

aten = torch.ops.aten
ROTATE = ("allgather", "alltoall")  # how keys go around; torch's default comes first
_SEQUENCE = 2  # of [batch, head, sequence, width]


def mesh_of_all() -> DeviceMesh:
    """One axis of all ranks."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def context_parallel_error() -> str:
    """What happens when `context_parallel` is used as documented, on a small attention: the error, or "runs"."""
    ranks = dist.get_world_size()
    qkv = [torch.randn(1, 2, 8 * ranks, 16) for _ in range(3)]
    try:
        with ring.context_parallel(mesh_of_all(), buffers=qkv, buffer_seq_dims=[_SEQUENCE] * 3):
            nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
    except Exception as error:  # whatever it is: it is what is reported
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "runs"


def _forward(query: Any, key: Any, value: Any, *, is_causal: bool, scale: float) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)


def _backward(*, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, grad_out: Any, **options: Any) -> Any:
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(
        grad_out, query, key, value, out, logsumexp, 0.0, options["is_causal"], scale=options["scale"]
    )  # fmt: skip


class TorchRing(torch.autograd.Function):
    """torch's ring, both passes; sequences are dealt out by its load balancer."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """-> out of this rank's queries."""
        group = dist.group.WORLD
        out, lse = template._templated_ring_attention(
            group, _SEQUENCE, _forward, query, key, value, is_causal=True, scale=scale
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        """-> gradients of this rank's queries, keys and values."""
        query, key, value, out, lse = ctx.saved_tensors
        grads = template._templated_ring_attention_backward(
            dist.group.WORLD, _SEQUENCE, _backward, grad_out, "grad_out", query, key, value, out, lse, True,
            scale=ctx.scale,
        )  # fmt: skip
        return (*grads[:3], None)


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **options: Any
) -> tuple[torch.Tensor, None]:
    made = TorchRing.apply(query, key, value, options["scaling"])
    return made.transpose(1, 2), None


AttentionInterface.register("torch_ring", _attention)  # without a mask of its own: it is causal


def ring_step(model: Any, rotate: str, lr: float) -> Callable[[torch.Tensor], float]:
    """One step of a language model of transformers on a sequence that all ranks share; the loss over all of it."""
    model.set_attn_implementation("torch_ring")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    mesh, ranks = mesh_of_all(), dist.get_world_size()

    def step(ids: torch.Tensor) -> float:
        template.set_rotate_method(rotate)
        targets = nn.functional.pad(ids, (0, 1), value=-100)[:, 1:]
        positions = torch.arange(ids.shape[1])[None]
        balancer = _create_default_load_balancer(ids.shape[1], ranks, ids.device)
        parts = template._context_parallel_buffers(mesh, [ids, targets, positions], [1, 1, 1], balancer)
        ids, targets, positions = (part for part in parts if isinstance(part, torch.Tensor))
        logits = model(input_ids=ids, position_ids=positions).logits
        count = ranks * ids.shape[1] - 1
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / count
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads] + [loss.detach()[None]])
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat[:-1].split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))
        optimizer.step()
        optimizer.zero_grad()
        return float(flat[-1])

    return step
