"""Matrices whose eigenvalues are known, and how often they are used."""

from __future__ import annotations

import math

import torch


def symmetric(eigenvalues, seed=1):
    """A random symmetric matrix with these eigenvalues."""
    w = torch.as_tensor(eigenvalues)
    n = len(w)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=w.dtype)).Q
    return (Q * w) @ Q.T


class Counting:
    """An operator that counts its products, and breaks off at one of them."""

    def __init__(self, matrix, stop_at=math.inf):
        self.matrix, self.stop_at, self.products = matrix, stop_at, 0
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def __matmul__(self, v):
        self.products += 1 if v.dim() == 1 else v.shape[1]
        if self.products >= self.stop_at:
            raise KeyboardInterrupt
        return self.matrix @ v
