"""Small models whose whole Hessian can be had, on real data: where approximations of it are compared.

All in float64, with at most 2,500 parameters (but for larger fields) and 40 to 1,000 samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from models import Transformer, mlp
from torch import Tensor, nn

from curvext.demo.data import load


@dataclass
class Problem:
    """A model, its loss and one batch."""

    model: nn.Module
    loss: Callable[[Any, Tensor], Tensor]
    data: tuple[Tensor, Tensor]
    rate: float = 1e-2

    def value(self) -> Tensor:
        """The loss."""
        x, y = self.data
        return self.loss(self.model(x), y)

    def train(self, steps: int) -> float:
        """Adam on the whole batch, its step size falling to zero; returns the loss."""
        optimizer = torch.optim.Adam(self.model.parameters(), self.rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            self.value().backward()
            optimizer.step()
            schedule.step()
        return float(self.value().detach())


@cache
def digits(n: int = 500) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1] as rows, and labels."""
    x, y = load("digits").train
    return x[:n].double(), y[:n]


def classifier(hidden: int = 20) -> Problem:
    """Digits by an MLP 64-20-20-10."""
    return Problem(mlp(64, hidden, hidden, 10, activation=nn.Tanh).double(), F.cross_entropy, digits())


def regression() -> Problem:
    """A wave on the square by an MLP 2-28-28-28-1."""
    x = torch.rand(500, 2, dtype=torch.float64) * 2 - 1
    y = torch.sin(4 * x[:, :1]) * torch.cos(3 * x[:, 1:])
    return Problem(mlp(2, 28, 28, 28, 1, activation=nn.Tanh).double(), F.mse_loss, (x, y))


def autoencoder() -> Problem:
    """Digits through 64-16-8-16-64."""
    x, _ = digits()
    return Problem(mlp(64, 16, 8, 16, 64, activation=nn.Tanh).double(), F.mse_loss, (x, x))


def cnn() -> Problem:
    """Digits by two convolutions and two linear layers."""
    convolutions = (nn.Conv2d(1, 8, 3, 2, 1), nn.Tanh(), nn.Conv2d(8, 16, 3, 2, 1), nn.Tanh(), nn.Flatten())
    model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *convolutions, *mlp(64, 16, 10, activation=nn.Tanh))
    return Problem(model.double(), F.cross_entropy, digits(250))


def transformer() -> Problem:
    """The next grey value along a row of a digit, by one block of ten features."""
    values = ((digits(5)[0] + 1) * 8).long().view(-1, 8)
    model = Transformer(17, features=10, heads=2, depth=1, length=7).double()
    return Problem(model, lambda z, y: F.cross_entropy(z.flatten(0, -2), y.flatten()), (values[:, :-1], values[:, 1:]))


class Field(nn.Module):
    """u = k * tanh θ at some of n points on a line; k(d) = exp(-|d| / length): parameters that act where they are."""

    def __init__(self, n: int, length: float = 20.0):
        super().__init__()
        self.field = nn.Parameter(0.5 * torch.randn(n, dtype=torch.float64))
        distance = torch.arange(n + round(40 * length), dtype=torch.float64)  # as far as k is above rounding
        kernel = torch.exp(-torch.minimum(distance, len(distance) - distance) / length) / (2 * length)
        self.register_buffer("spectrum", torch.fft.rfft(kernel).real)
        self.padded = len(distance)

    def forward(self, seen: Tensor) -> Tensor:
        u = torch.fft.rfft(torch.tanh(self.field), self.padded) * self.spectrum
        return torch.fft.irfft(u, self.padded)[seen]


def field(n: int = 2048) -> Problem:
    """A field from half of its blurred and noisy values."""
    model, truth = Field(n), Field(n)
    seen = torch.randperm(n)[: n // 2].sort().values
    with torch.no_grad():
        truth.field.copy_(torch.sin(torch.arange(n) / 15.0) + torch.cos(torch.arange(n) / 47.0))
        y = truth(seen) + 0.01 * torch.randn(n // 2, dtype=torch.float64)
    return Problem(model, F.mse_loss, (seen, y), rate=3e-2)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "classifier": classifier,
    "regression": regression,
    "autoencoder": autoencoder,
    "CNN": cnn,
    "transformer": transformer,
    "field": field,
}
