"""Products with a number, as a module."""

from __future__ import annotations

from torch import Tensor, nn


class ScaleModule(nn.Module):
    """``weight * input``; the weight is a number and not trained."""

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        return self.weight * input
