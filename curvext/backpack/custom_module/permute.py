"""Permutations of dimensions, as a module."""

from __future__ import annotations

from torch import Tensor, nn


class Permute(nn.Module):
    """``input.permute(*dims)``, or with ``init_transpose=True`` ``input.transpose(*dims)``."""

    def __init__(self, *dims: int, init_transpose: bool = False):
        super().__init__()
        self.dims, self.init_transpose = dims, init_transpose

    def forward(self, input: Tensor) -> Tensor:
        return input.transpose(*self.dims) if self.init_transpose else input.permute(*self.dims)
