"""Models as users write them, and their losses, for tests of whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import check

N = 4


def classified(model: nn.Module, x: Any, n: int = N, classes: int = 3, **options: Any) -> None:
    y = torch.randint(0, classes, (n,))
    check(model, x, lambda z: F.cross_entropy(z, y), lambda z: F.cross_entropy(z, y, reduction="none") / n, **options)


def fitted(model: nn.Module, x: Any, *shape: int, **options: Any) -> None:
    """Squared error, for outputs ``[N, *shape]``."""
    y = torch.randn(N, *shape)
    check(model, x, lambda z: F.mse_loss(z, y), lambda z: (z - y).square().flatten(1).sum(1) / y.numel(), **options)


def images(channels: int = 2, *size: int, n: int = N) -> Tensor:
    return torch.randn(n, channels, *(size or (4, 4)))


def sequences(t: int = 3, width: int = 4) -> Tensor:
    return torch.randn(N, t, width)


class Of(nn.Module):
    """A model whose forward pass is a function of its parts and the input."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, *x: Tensor) -> Any:
        return self.function(self, *x)


class Seeded(nn.Module):
    """A model whose every forward pass draws the same masks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return self.model(x)


def pooled(*layers: nn.Module, channels: int = 3) -> nn.Module:
    """Layers on images, the mean over positions, and a linear head."""
    return Of(
        lambda m, x: m.head(m.body(x).flatten(2).mean(2)), body=nn.Sequential(*layers), head=nn.Linear(channels, 3)
    )
