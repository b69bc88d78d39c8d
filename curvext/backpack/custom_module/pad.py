"""Padding, as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Pad(nn.Module):
    """``torch.nn.functional.pad``, with its arguments."""

    def __init__(self, pad: Sequence[int], mode: str = "constant", value: float = 0.0):
        super().__init__()
        self.pad, self.mode, self.value = pad, mode, value

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.pad, self.mode, self.value)
