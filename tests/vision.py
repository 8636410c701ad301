"""Plain modules of the kinds that torchvision and diffusers have, and of older kinds, each with its loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with batch norm, and a projection where the shape changes (He et al. 2015)."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out = 2 * width
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.relu(self.bn1(self.conv1(x)))
        hidden = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(hidden)))))
        return self.relu(hidden + self.downsample(x))


class ResNet(nn.Module):
    """Stem with max pooling, bottlenecks in two widths, global average pooling, a classifier."""

    def __init__(self, width: int = 16, classes: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.layer1 = nn.Sequential(Bottleneck(width, width), Bottleneck(2 * width, width))
        self.layer2 = nn.Sequential(Bottleneck(2 * width, 2 * width, 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(4 * width, classes)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixels: [batch, 3, height, width]; labels: [batch] classes."""
        hidden = self.layer2(self.layer1(self.stem(pixels)))
        logits = self.fc(torch.flatten(self.avgpool(hidden), 1))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project (Howard et al. 2019, MobileNetV3)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.squeeze, self.excite = nn.Conv2d(hidden, 8, 1), nn.Conv2d(8, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.depthwise(self.expand(x))
        weight = functional.relu(self.squeeze(functional.adaptive_avg_pool2d(hidden, 1)))
        return x + self.project(hidden * functional.hardsigmoid(self.excite(weight)))


class MobileNet(nn.Module):
    """A stem, two inverted residuals, average pooling with a window, a classifier without reduction of the batch."""

    def __init__(self, width: int = 16, classes: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.Hardswish())
        self.blocks = nn.Sequential(InvertedResidual(width, 2 * width), InvertedResidual(width, 4 * width))
        self.pool, self.head = nn.AvgPool2d(4), nn.Linear(16 * width, classes)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """pixels: [batch, 3, 16, 16]; labels: [batch] classes -> the loss."""
        hidden = self.pool(self.blocks(self.stem(pixels)))
        losses = functional.cross_entropy(self.head(hidden.flatten(1)), labels, label_smoothing=0.1)
        return losses


def timestep_embedding(steps: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines of the steps: [batch] -> [batch, width] (Vaswani et al. 2017)."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(width // 2, dtype=torch.float64, device=steps.device) / width)
    angles = steps[:, None].to(torch.float64) * rates[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ResidualBlock(nn.Module):
    """Group norm, SiLU, convolution, twice, with the time added between."""

    def __init__(self, channels: int, out: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(time, out)
        self.norm2, self.conv2 = nn.GroupNorm(8, out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = hidden + self.time(functional.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(functional.silu(self.norm2(hidden)))


class SpatialAttention(nn.Module):
    """Self-attention over the pixels."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(8, channels),
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(pixels).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(mixed).transpose(1, 2).reshape(batch, channels, height, width)


class UNet(nn.Module):
    """A diffusion U-Net: down by strided convolutions, attention, up by a transposed one and by interpolation."""

    def __init__(self, width: int = 16, time: int = 32) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down1, self.half1 = ResidualBlock(width, width, time), nn.Conv2d(width, width, 3, 2, 1)
        self.down2, self.half2 = ResidualBlock(width, 2 * width, time), nn.Conv2d(2 * width, 2 * width, 3, 2, 1)
        self.middle, self.attention = ResidualBlock(2 * width, 2 * width, time), SpatialAttention(2 * width)
        self.double2, self.up2 = (
            nn.ConvTranspose2d(2 * width, 2 * width, 4, 2, 1),
            ResidualBlock(4 * width, width, time),
        )
        self.double1 = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(width, width, 3, padding=1))
        self.up1 = ResidualBlock(2 * width, width, time)
        self.last = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, noisy: torch.Tensor, steps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """noisy, noise: [batch, 3, height, width]; steps: [batch] integers -> the mean squared error."""
        time = self.time(timestep_embedding(steps, self.width).to(noisy.dtype))
        first = self.down1(self.first(noisy), time)
        second = self.down2(self.half1(first), time)
        hidden = self.attention(self.middle(self.half2(second), time))
        hidden = self.up2(torch.cat([self.double2(hidden), second], dim=1), time)
        hidden = self.up1(torch.cat([self.double1(hidden), first], dim=1), time)
        return functional.mse_loss(self.last(hidden), noise)


class ConvNet1d(nn.Module):
    """A waveform classifier: 1-D convolutions, instance norm, PReLU, pooling, and a pairwise loss."""

    def __init__(self, width: int = 16, classes: int = 8) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = (
            nn.Conv1d(1, width, 8, 4),
            nn.InstanceNorm1d(width, affine=True),
            nn.PReLU(width),
        )
        self.conv2, self.norm2 = nn.Conv1d(width, 2 * width, 3, groups=4, padding=1), nn.BatchNorm1d(2 * width)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, wave: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """wave: [batch, 1, samples]; targets: [batch, classes] probabilities -> the loss."""
        hidden = self.act1(self.norm1(self.conv1(wave)))
        hidden = functional.max_pool1d(functional.elu(self.norm2(self.conv2(hidden))), 2)
        pooled = torch.cat([hidden.mean(-1), hidden.amax(-1)], dim=-1)
        return functional.binary_cross_entropy_with_logits(self.head(pooled), targets)


class UpNet(nn.Module):
    """A segmentation net: reflecting pads, leaky ReLU, bilinear interpolation to the image, a loss by pixel."""

    def __init__(self, width: int = 16, classes: int = 8) -> None:
        super().__init__()
        self.pad, self.conv1 = nn.ReflectionPad2d(1), nn.Conv2d(3, width, 3, 2)
        self.norm, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """pixels: [batch, 3, height, width]; labels: [batch, height, width] -> the loss."""
        hidden = functional.leaky_relu(self.norm(self.conv1(self.pad(pixels))), 0.1)
        hidden = functional.dropout(functional.softplus(self.conv2(hidden)), 0.0)
        scores = functional.interpolate(self.head(hidden), pixels.shape[-2:], mode="bilinear", align_corners=False)
        return functional.cross_entropy(scores, labels, ignore_index=0)


class EncoderDecoder(nn.Module):
    """torch's own transformer layers with padding masks, an embedding with padding, and RMSNorm at the end."""

    def __init__(self, vocabulary: int = 64, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.encoder = nn.TransformerEncoderLayer(width, 4, 64, activation="gelu", **options)
        self.decoder = nn.TransformerDecoderLayer(width, 4, 64, **options)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """source, target: [batch, length] tokens -> the loss."""
        padding = source == 0
        causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool, device=target.device).triu(1)
        memory = self.encoder(self.embed(source), src_key_padding_mask=padding)
        hidden = self.decoder(self.embed(target), memory, tgt_mask=causal, memory_key_padding_mask=padding)
        logits = self.head(self.norm(hidden))
        return functional.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)


class Recurrent(nn.Module):
    """A language model with an LSTM and a GRU."""

    def __init__(self, vocabulary: int = 64, width: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.lstm, self.gru = nn.LSTM(width, width, batch_first=True), nn.GRU(width, width, batch_first=True)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """tokens, labels: [batch, length] -> the loss."""
        hidden, _ = self.gru(self.lstm(self.embed(tokens))[0])
        return functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())
