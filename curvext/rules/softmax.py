"""Softmax and its logarithm, exact given a diagonal h, in O(classes); and as Becker and LeCun (1989) count them."""

from __future__ import annotations

from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .structure import bent

SOFTMAX = ("SoftmaxBackward0", "SafeSoftmaxBackward0", "MaskedSoftmaxBackward0")


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


@rule(*SOFTMAX)
def softmax(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """p = softmax z:  h_z = p² [(1 - 2p) h + Σp²h] + (1 - 2p) v, where v = p (g - Σpg) is the gradient of z.

    Jᵢⱼ = pᵢ (δᵢⱼ - pⱼ), and ∂vⱼ/∂zⱼ = (1 - pⱼ) vⱼ - pⱼ vⱼ. A masked entry has p = 0.
    """
    p, dim = op.result, -1 if op.dim is None else op.dim
    squares = p * p
    inner = None if g is None else g - (p * g).sum(dim, keepdim=True)
    if h is None:
        return None if inner is None else (p - 2 * squares) * inner
    wave = (p - 2 * squares) * bent(inner, p, h)
    return wave.addcmul_(squares, (squares * h).sum(dim, keepdim=True))


@rule(*SOFTMAX, wave="bl89")
def softmax_elementwise(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """Each qᵢ is taken for a function of zᵢ alone, q' = q (1 - q), q'' = q' (1 - 2q):  h_z = q' (q' h + (1 - 2q) g)."""
    q = op.result
    slope = q - q * q
    inner = None if h is None else slope * h
    if g is not None:
        inner = bent(inner, 1 - 2 * q, g)
    return None if inner is None else slope * inner


@rule("LogSoftmaxBackward0", wave="bl89")
def log_softmax_elementwise(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = log q after the elementwise q:  h_q = (h - g)/q², g_q = g/q, hence h_z = (1 - q) ((1 - q) h - q g)."""
    q = op.result.exp()
    rest = 1 - q
    inner = None if h is None else rest * h
    if g is not None:
        inner = bent(inner, q, g, -1)
    return None if inner is None else rest * inner
