"""Blocks anywhere in the matrix, between nodes of one level of the tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """A[i, j] of B pairs of nodes, all with i = j; or all with i < j, and mirrored: A[j, i] = A[i, j]ᵀ.

    Args:
        level: of the nodes, which are 2^level.
        places: i and j, ``[2, B]``, integers of 32 bits.
        factors: the entries ``[B, n, n]`` alone, or U ``[B, n, k]``, c ``[B, k]`` and V ``[B, n, k]`` of U diag(c) Vᵀ.
        mirrored: whether i < j.
    """

    level: int
    places: Tensor
    factors: tuple[Tensor, ...]
    mirrored: bool

    def times(self, v: Tensor) -> Tensor:
        """Products ``[size, K]`` to ``[size, K]``."""
        x = v.reshape(1 << self.level, -1, v.shape[1])
        out, (i, j) = torch.zeros_like(x), self.places
        out.index_add_(0, i, _product(self.factors, x[j]))
        if self.mirrored:
            out.index_add_(0, j, _product(_transposed(self.factors), x[i]))
        return out.reshape(v.shape)

    def diagonal(self) -> Tensor:
        """The diagonal's entries, as a column ``[size, 1]``."""
        n = self.factors[0].shape[1]
        out = self.factors[0].new_zeros(1 << self.level, n)
        if not self.mirrored:
            out.index_add_(0, self.places[0], _diagonal(self.factors))
        return out.view(-1, 1)

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
