"""Targets of small losses, and a net for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

N = 4


def data(*shape: int, low: float = -1.0, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * (1 - low) + low


Y = torch.tensor([0, 2, 1, 2])
IGNORED = torch.tensor([0, -100, 1, 2])
T, P, W = data(N, 3), data(N, 3, low=0.1), data(3, low=0.5)
SIGNS = data(N, 3).sign()
GRID = torch.arange(4 * N).view(N, 2, 2) % 3


def net(*shape: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, int(torch.tensor(shape).prod())), nn.Unflatten(1, shape)
    )
