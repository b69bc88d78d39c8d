"""Small models of every architecture that the tests of blocks and quantities share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, Callable[[], Tensor]]


def mlp(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 6), activation(), nn.Linear(6, 3))


def one_hidden(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """With a separable loss, HesScale is exact for every parameter of this net."""
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


class Residual(nn.Module):
    """A batch-normalised convolution with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x * 0.5 + self.norm(self.conv(x))).mean((2, 3)))


class Branches(nn.Module):
    """Piecewise linear, with all that such networks have between their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.shortcut = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(2, 3, 3, bias=False)
        self.rows, self.head = nn.Embedding(2, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(x))) / 3 + self.shortcut(x)
        return self.head(torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1) - self.rows((x.sum((1, 2, 3)) > 0).long()))


class Attention(nn.Module):
    """One pre-norm transformer block over tokens, written with matrix products."""

    def __init__(self, vocabulary: int = 5, width: int = 4, tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.transpose(-2, -1) / 2, -1) @ v)
        return self.head(F.gelu(x))


def _classified(model: nn.Module, *shape: int, seed: int = 1) -> Built:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 3, shape[:1], generator=generator)
    return model, lambda: F.cross_entropy(model(x), y)


def _tokens(model: nn.Module) -> Built:
    tokens = torch.randint(0, 5, (2, 4), generator=torch.Generator().manual_seed(1))
    return model, lambda: F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


MODELS: dict[str, Callable[[], Built]] = {
    "mlp": lambda: _classified(mlp(), 6, 4),
    "cnn": lambda: _classified(cnn(), 3, 2, 6, 6),
    "residual": lambda: _classified(Residual(), 3, 2, 3, 3),
    "attention": lambda: _tokens(Attention()),
    "tied": lambda: _tokens(Attention(tied=True)),
}
