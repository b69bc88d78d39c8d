"""Symmetric matrices with and without structure, to be approximated."""

from __future__ import annotations

import torch
from torch import Tensor


def kernel(n: int) -> Tensor:
    """Two length scales on a line."""
    t = torch.linspace(0, 1, n)
    d = (t[:, None] - t).abs()
    return 1 / (1 + (200 * d) ** 2) + torch.exp(-d / 0.1)


def plane(side: int) -> Tensor:
    """A Gaussian kernel on a grid, row by row."""
    t = torch.linspace(0, 1, side)
    x = torch.cartesian_prod(t, t)
    return torch.exp(-(torch.cdist(x, x) ** 2) / 0.1) + 0.1 * torch.eye(side**2)


def spread(n: int, rank: int) -> Tensor:
    """Positive, with a decaying spectrum and no structure."""
    q = torch.linalg.qr(torch.randn(n, rank))[0]
    return (q * torch.logspace(0, -2, rank)) @ q.T


def positive(n: int) -> Tensor:
    """Positive, of full rank."""
    x = torch.randn(n, n)
    return x @ x.T


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in Frobenius norm."""
    return float((got - want).norm() / want.norm())
