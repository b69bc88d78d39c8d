"""Softmax and its logarithm, exact given a diagonal h, in O(classes); and as Becker and LeCun (1989) count them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..graph import Operation
from ..hessians import LossHessian, SoftmaxHessian
from ..registry import rule
from .structure import bent

SOFTMAX = ("SoftmaxBackward0", "SafeSoftmaxBackward0", "MaskedSoftmaxBackward0")


@rule("LogSoftmaxBackward0")
def log_softmax(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = z - logsumexp z, p = exp y:  h_z = h (1 - 2p) + p² Σh - (Σg)(p - p²)."""
    p, dim = op.result.exp(), op.dim
    total: Any = 0.0 if g is None else g.sum(dim, keepdim=True)
    if h is None:  # p (p - 1) Σg
        wave = p * -total
        return wave.addcmul_(wave, p, value=-1)
    # h + p (p (Σh + Σg) - Σg - 2h)
    inner = p * (h.sum(dim, keepdim=True) + total)
    inner = inner.sub_(h, alpha=2)
    return torch.addcmul(h, p, inner if g is None else inner.sub_(total))


@rule(*SOFTMAX)
def softmax(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """p = softmax z:  h_z = p² [(1 - 2p) h + Σp²h] + (1 - 2p) v, where v = p (g - Σpg) is the gradient of z.

    Jᵢⱼ = pᵢ (δᵢⱼ - pⱼ), and ∂vⱼ/∂zⱼ = (1 - pⱼ) vⱼ - pⱼ vⱼ. A masked entry has p = 0.
    """
    p, dim = op.result, -1 if op.dim is None else op.dim
    v = None if g is None else op.vjp(g)[0]
    if h is None:
        return v if v is None else torch.addcmul(v, v, p, value=-2)
    wave = (p * h).mul_(p)
    inner = p * wave.sum(dim, keepdim=True)
    wave = wave if v is None else wave.add_(v)
    return wave.addcmul_(p, inner.sub_(wave, alpha=2))  # (1 - 2p) (p²h + v) + p² Σp²h


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


@rule("LogSoftmaxBackward0", wave="source")
def log_softmax_hessian(op: Operation, g: Any) -> dict[int, LossHessian]:
    """B = -(Σg) (diag p - p pᵀ)."""
    w = -g[0].sum(op.dim, keepdim=True)
    return {0: SoftmaxHessian(op.result.exp(), w, op.dim)}
