"""Networks whose cost is measured, with a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Task:
    """A model and a batch; the loss is mean cross entropy."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x).flatten(0, -2), self.y.flatten())


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with an activation between them."""
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for fan_in, fan_out in pairwise(widths[1:]):
        layers += [activation(), nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers)


def classification(model: nn.Module, *shape: int, classes: int = 10) -> Task:
    """Random inputs and labels."""
    return Task(model, torch.randn(shape), torch.randint(classes, shape[:1]))


def cnn_3c3d() -> nn.Sequential:
    """3C3D for images of 3x32x32: three convolutions and three linear layers (DeepOBS)."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def all_cnn_c(classes: int = 100) -> nn.Sequential:
    """All-CNN-C for images of 3x32x32, without its dropout: nine convolutions (DeepOBS)."""
    widths = [(3, 96, 1), (96, 96, 1), (96, 96, 2), (96, 192, 1), (192, 192, 1), (192, 192, 2)]
    layers = [m for a, b, stride in widths for m in (nn.Conv2d(a, b, 3, stride, padding=1), nn.ReLU())]
    head = (nn.Conv2d(192, 192, 3), nn.ReLU(), nn.Conv2d(192, 192, 1), nn.ReLU(), nn.Conv2d(192, classes, 1), nn.ReLU())
    return nn.Sequential(*layers, *head, nn.AvgPool2d(6), nn.Flatten())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut."""

    def __init__(self, fan_in: int, fan_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(fan_out), nn.ReLU()
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(fan_out), nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


def resnet18(width: int = 32) -> nn.Sequential:
    """ResNet-18 for images of 3x32x32, of a width that a CPU can train (the original has 64)."""
    stem = (nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    stages = [
        block
        for i, (fan_in, fan_out) in enumerate(pairwise(widths))
        for block in (ResidualBlock(fan_in, fan_out, 1 if i == 0 else 2), ResidualBlock(fan_out, fan_out, 1))
    ]
    return nn.Sequential(*stem, *stages, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8 * width, 10))


class TransformerBlock(nn.Module):
    """Causal attention and a GELU network, each after layer normalisation and with a shortcut."""

    def __init__(self, features: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small language model."""

    def __init__(self, vocabulary: int = 256, features: int = 128, heads: int = 4, depth: int = 2, length: int = 32):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, features), nn.Embedding(length, features)
        self.blocks = nn.Sequential(*(TransformerBlock(features, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(features), nn.Linear(features, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.places(places))))


def language(n: int, length: int = 32, vocabulary: int = 256) -> Task:
    """The small language model on random text."""
    text = torch.randint(vocabulary, (n, length + 1))
    return Task(Transformer(vocabulary, length=length), text[:, :-1], text[:, 1:])


MODELS: dict[str, Callable[[int], Task]] = {
    "MLP 784-512-256-10": lambda n: classification(mlp(784, 512, 256, 10), n, 784),
    "3C3D": lambda n: classification(cnn_3c3d(), n, 3, 32, 32),
    "ResNet-18, width 32": lambda n: classification(resnet18(), n, 3, 32, 32),
    "transformer, 2 blocks of 128": language,
}
