"""Operations in place on a view, of which autograd records only that they happened (``CopySlices``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..graph import Operation
from ..registry import rule
from .default import default
from .structure import bending, pointwise_rule

GOLDEN = 2654435769  # 2³² / golden ratio: its multiples modulo 2³² are spread evenly


@rule("torch::autograd::CopySlices", how="structure")
def copy_slices(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """x[view] = f(x[view], ...): (Jᵀ1) ∘ (Jᵀh) + ∂(Jᵀg)/∂x · 1 if f proves to act entry by entry, else the default.

    The node hides f, so its structure is read off its derivatives. Let bₖ be the slopes from one input entry to the
    outputs, and w distinct weights. (Σ bₖ wₖ)² - (Σ bₖ)(Σ bₖ wₖ²) = -Σ_{j<k} bⱼ bₖ (wⱼ - wₖ)² vanishes for generic w
    only if at most one bₖ differs from zero. Likewise D = ∂(Jᵀg)/∂x is diagonal if D w = (D 1) ∘ w.
    """
    if (h is None or _feeds_one_output(op, h)) and (g is None or _bends_alone(op, g)):
        return pointwise_rule(op, g, h)
    return default(op, None if g is None else [g], None if h is None else [h])


def _feeds_one_output(op: Operation, h: Tensor) -> bool:
    w = _distinct(h)
    slopes = zip(op.needs, op.vjp(torch.ones_like(w)), op.vjp(w), op.vjp(w * w), strict=True)
    return all(_equal(b * bww, bw * bw) for needed, b, bw, bww in slopes if needed and b is not None)  # type: ignore[operator]


def _bends_alone(op: Operation, g: Tensor) -> bool:
    once = bending(op, g)
    weighted = bending(op, g, _distinct) if once else {}
    return all(_equal(bend * _distinct(bend), weighted[i]) for i, bend in once.items())


def _distinct(like: Tensor) -> Tensor:
    """Weights between 1 and 2, without a random generator."""
    steps = torch.arange(like.numel(), device=like.device) * GOLDEN % (1 << 32)
    return (1 + steps.double() / (1 << 32)).to(like.dtype).view(like.shape)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equality up to rounding; while a graph is traced, of the numbers it is traced with, and false if it has none."""
    with _disable_current_modes():
        try:
            return torch.allclose(a, b, rtol=torch.finfo(a.dtype).eps ** 0.5, atol=0, equal_nan=True)
        except RuntimeError:
            return False
