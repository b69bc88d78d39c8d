"""Sums and differences: constant slopes."""

from __future__ import annotations

from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .structure import pointwise

pointwise("SubBackward0", "DivBackward0", "PowBackward0", "NegBackward0")


@rule("AddBackward0")
def add(op: Operation, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, ...] | None:
    """y = a + α b."""
    if h is None:
        return None
    return h, (h if op.alpha == 1 else h * op.alpha**2)
