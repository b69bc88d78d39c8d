"""One of several outputs, as a module."""

from __future__ import annotations

from typing import Any

from torch import nn


class ReduceTuple(nn.Module):
    """``input[index]``, as after an LSTM."""

    def __init__(self, index: int = 0):
        super().__init__()
        self.index = index

    def forward(self, input: Any) -> Any:
        return input[self.index]
