"""What reaches a table whose rows are looked up, without forming a table for every column and sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .persample import Dense, PerSample, combined, inner


@dataclass(frozen=True)
class Rows(PerSample):
    """Σ_t e ⊗ s: the wave s at position t belongs to the row that was looked up there.

    Args:
        s: the wave, ``[V, N, T, O]``.
        index: the row of every position, ``[N, T]``.
        shape: of the table, ``[I, O]``.
    """

    s: Tensor
    index: Tensor
    shape: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.s.shape[0], self.s.shape[1]

    def empty(self, shape: Sequence[int]) -> Tensor:
        return self.s.new_empty(shape)

    @property
    def _keys(self) -> Tensor:
        """The place of every position's row in a table of each sample, ``[N·T]``."""
        samples = torch.arange(len(self.index), device=self.index.device).unsqueeze(1)
        return (samples * self.shape[0] + self.index).flatten()

    def _merged(self) -> tuple[Tensor, Tensor]:
        """Waves of equal row and sample added up, ``[V, N·T, O]`` with zeros at the end, and the key of each."""
        ordered, order = self._keys.sort()
        number = torch.cat([ordered.new_zeros(min(1, len(ordered))), (ordered.diff() != 0).long()]).cumsum(0)
        s = self.s.flatten(1, 2)
        keys = torch.zeros_like(ordered).scatter(0, number, ordered)
        return torch.zeros_like(s).index_add(1, number, s[:, order]), keys

    def dense(self, out: Tensor | None = None) -> Tensor:
        v, n = self.size
        out = self.empty((v, n, *self.shape)) if out is None else out
        out.zero_().view(v, -1, self.shape[1]).index_add_(1, self._keys, self.s.flatten(1, 2))
        return out

    def squares(self) -> Tensor:
        s, keys = self._merged()
        return s.new_zeros(self.shape).index_add(0, keys % self.shape[0], s.square().sum(0))

    def sample_squares(self) -> Tensor:
        s, keys = self._merged()
        n, (rows, columns) = self.size[1], self.shape
        return s.new_zeros(n * rows, columns).index_add(0, keys, s.square().sum(0)).view(n, rows, columns)

    def sums(self) -> Tensor:
        return self.s.new_zeros(len(self.s), *self.shape).index_add(1, self.index.flatten(), self.s.flatten(1, 2))

    def norms(self) -> Tensor:
        s, keys = self._merged()
        return s.new_zeros(self.size).index_add(1, keys // self.shape[0], s.square().sum(2))

    def inner(self, vectors: Tensor) -> Tensor:
        return inner(self.s, vectors[:, self.index])

    def combined(self, weights: Tensor) -> Tensor:
        waves = combined(self.s, weights).flatten(1, 2)
        return waves.new_zeros(len(weights), *self.shape).index_add(1, self.index.flatten(), waves)

    def entries(self, places: Tensor) -> Tensor:
        here = self.index == (places // self.shape[1]).view(-1, 1, 1)  # M N T
        return (self.s.permute(3, 0, 1, 2)[places % self.shape[1]] * here.unsqueeze(1)).sum(3)

    def select(self, samples: Sequence[int]) -> Rows:
        return replace(self, s=self.s[:, list(samples)], index=self.index[list(samples)])

    def plus(self, other: PerSample) -> PerSample:
        if isinstance(other, Rows) and (self.shape, self.size) == (other.shape, other.size):
            return replace(self, s=torch.cat([self.s, other.s], 2), index=torch.cat([self.index, other.index], 1))
        return super().plus(other)

    def through(self, op: Any, apply: Callable[[Tensor], Tensor]) -> PerSample:
        return Dense(self.dense()).through(op, apply)
