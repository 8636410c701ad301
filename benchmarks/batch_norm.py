"""Batch norm over the batch of all ranks, by hand: what torch's SyncBatchNorm does, which refuses to run on CPU.

One all-reduce each way: sums and sums of squares forward, the two sums of the gradient backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class _Normalized(torch.autograd.Function):
    """x normalized per channel over the rows of all ranks; also the mean and the variance, for running statistics."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Any:
        count = x.numel() // x.shape[1] * dist.get_world_size()
        sums = torch.cat([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
        dist.all_reduce(sums)
        mean, squares = (sums / count).chunk(2)
        variance = squares - mean.square()
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.count = count
        ctx.mark_non_differentiable(mean, variance)
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, mean, scale = ctx.saved_tensors
        grad, shape = grads[0], (1, -1, 1, 1)
        of_bias = grad.sum((0, 2, 3))
        of_weight = scale * ((grad * x).sum((0, 2, 3)) - mean * of_bias)
        sums = torch.cat([of_bias, of_weight])
        dist.all_reduce(sums)
        bias_mean, weight_mean = (sums / ctx.count).chunk(2)
        # weight * scale * (grad - bias_mean - (x - mean) * scale * weight_mean), in two passes over the images
        by_grad = weight * scale
        by_x = -by_grad * scale * weight_mean
        rest = -by_grad * bias_mean - by_x * mean
        of_x = torch.addcmul(rest.view(shape), x, by_x.view(shape)).addcmul_(grad, by_grad.view(shape))
        return of_x, of_weight, of_bias, None


class SynchronizedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d in training, with the statistics of the global batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows of this rank, channels, height, width]."""
        made, mean, variance = _Normalized.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return made


def synchronized(model: nn.Module) -> nn.Module:
    """The model with every BatchNorm2d replaced, parameters and buffers kept."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                new = SynchronizedBatchNorm(child.num_features, child.eps, child.momentum)
                new.to(child.weight).load_state_dict(child.state_dict())
                setattr(module, name, new)
    return model
