"""Blocks anywhere in the matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """B blocks of one shape, all on the diagonal; or all above it, and mirrored: A[j, i] = A[i, j]ᵀ.

    Args:
        places: their first rows and columns, ``[2, B]``, integers of 32 bits.
        factors: the entries ``[B, m, n]`` alone, or U ``[B, m, k]``, c ``[B, k]`` and V ``[B, n, k]`` of U diag(c) Vᵀ.
        mirrored: whether they are above the diagonal.
    """

    places: Tensor
    factors: tuple[Tensor, ...]
    mirrored: bool

    def _indices(self) -> tuple[Tensor, Tensor]:
        """Rows ``[B, m]`` and columns ``[B, n]``."""
        left, right = self.factors[0], _transposed(self.factors)[0]
        i, j = self.places.unsqueeze(2)
        return i + torch.arange(left.shape[1], device=i.device), j + torch.arange(right.shape[1], device=i.device)

    def add_times(self, out: Tensor, v: Tensor) -> None:
        """``out +=`` their products with ``v [size, K]``, in place."""
        i, j = self._indices()
        out.index_add_(0, i.flatten(), _product(self.factors, v[j]).flatten(0, 1))
        if self.mirrored:
            out.index_add_(0, j.flatten(), _product(_transposed(self.factors), v[i]).flatten(0, 1))

    def add_diagonal(self, out: Tensor) -> None:
        """``out [size] +=`` the diagonal's entries, in place."""
        if not self.mirrored:
            out.index_add_(0, self._indices()[0].flatten(), _diagonal(self.factors).flatten())

    @property
    def bytes(self) -> int:
        """What is stored; U and V are one tensor on the diagonal."""
        stored = {id(t): t.nbytes for t in (self.places, *self.factors)}
        return sum(stored.values())

    def scaled(self, factor: float) -> Blocks:
        """``factor`` times them."""
        middle = len(self.factors) // 2  # c, or the entries
        return replace(self, factors=tuple(factor * f if i == middle else f for i, f in enumerate(self.factors)))

    def to(self, move: Callable[[Tensor], Tensor]) -> Blocks:
        """With their entries moved."""
        moved = {id(f): move(f) for f in self.factors}
        there = tuple(moved[id(f)] for f in self.factors)
        return replace(self, places=self.places.to(there[0].device), factors=there)


def _product(factors: tuple[Tensor, ...], x: Tensor) -> Tensor:
    if len(factors) == 1:
        return factors[0] @ x
    u, c, v = factors
    return u @ (c.unsqueeze(-1) * (v.mT @ x))


def _transposed(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (factors[0].mT,) if len(factors) == 1 else factors[::-1]


def _diagonal(factors: tuple[Tensor, ...]) -> Tensor:
    if len(factors) == 1:
        return factors[0].diagonal(dim1=1, dim2=2)
    u, c, _ = factors
    return (u.square() @ c.unsqueeze(-1)).squeeze(-1)
