"""Softmax and its logarithm, exact given a diagonal h, in O(classes)."""

from __future__ import annotations

from torch import Tensor

from ..graph import Operation
from ..registry import rule


@rule("LogSoftmaxBackward0")
def log_softmax(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = z - logsumexp z, p = exp y:  h_z = h (1 - 2p) + p² Σh - (Σg)(p - p²)."""
    p, dim = op.result.exp(), op.dim
    wave = None
    if g is not None:
        wave = g.sum(dim, keepdim=True) * (p * p - p)
    if h is not None:
        pulled = h * (1 - 2 * p) + p * p * h.sum(dim, keepdim=True)
        wave = pulled if wave is None else wave + pulled
    return wave
