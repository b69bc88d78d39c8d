"""Normalisations: y = γ x̂ + β, where x̂ is x divided by its scale along some axes, mostly after removing its mean there.

With x̂ = (x - μ)/σ over d entries (σ² = var + ε, so that ∂σ/∂x = x̂/d),

    ∂x̂ᵢ/∂xⱼ = (δᵢⱼ - 1/d - x̂ᵢ x̂ⱼ/d)/σ,      Jᵀu = (u - ū - s x̂)/σ  with  s = Σ u x̂ / d.

Squaring the first and differentiating the second gives both terms of equation (2) from a few sums over the axes: the
cost of the gradient. Without the mean (RMS norm, weight norm) the terms 1/d and ū are absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..graph import Operation
from ..registry import rule

Waves = tuple[Tensor | None, Tensor | None, Tensor | None]
Dims = list[int] | tuple[int, ...]


def normalized(
    xhat: Tensor, rstd: Tensor, w: Tensor | None, u: Tensor | None, dims: Dims, d: int, centred: bool = True
) -> Tensor:
    """Equation (2) across x̂ = (x - μ)/σ:  σ² h_x = a + x̂ (b + c x̂), where with sums Σ over the axes

        a = w (1 - 2/d) + Σw/d² - s (1 - 1/d),    b = 2 (Σwx̂ + Σu)/d² - 2u/d,    c = Σwx̂²/d² - 2w/d + 3s/d.

    Without the mean, a = w - s and b = -2u/d.

    Args:
        xhat, rstd: the normalised x, and 1/σ.
        w, u: wave and gradient at x̂; either may be ``None``.
        dims: the axes, of ``d`` entries together. For σ = ‖x‖ instead of a root mean square, d is 1.
        centred: whether the mean was removed.
    """
    a: Any = 0.0
    b: Any = 0.0
    c: Any = 0.0
    if w is not None:
        wx = w * xhat
        c = (wx * xhat).sum(dims, keepdim=True) / d**2 - w * (2 / d)
        a = w * (1 - 2 / d) + w.sum(dims, keepdim=True) / d**2 if centred else w
        b = wx.sum(dims, keepdim=True) * (2 / d**2) if centred else b
    if u is not None:
        s = (u * xhat).sum(dims, keepdim=True) / d
        a, b, c = a - s, b - u * (2 / d), c + s * (3 / d)
        if centred:
            a, b = a + s / d, b + u.sum(dims, keepdim=True) * (2 / d**2)
    return (c * xhat + b).mul_(xhat).add_(a).mul_(rstd.square())


def affine_normalized(
    op: Operation,
    g: Tensor | None,
    h: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor | None,
    dims: Dims,
) -> Waves:
    """Equation (2) across y = γ x̂ + β, for x, γ and β: h_γ = h x̂², h_β = h, both still to be summed."""
    if not (op.needs[0] or op.needs[1]):
        return None, None, h
    xhat = (x if mean is None else x - mean) * rstd
    wave = None
    if op.needs[0]:
        w = h if h is None or gamma is None else h * gamma.square()
        u = g if g is None or gamma is None else g * gamma
        d = x.numel() // max(rstd.numel(), 1)
        wave = normalized(xhat, rstd, w, u, dims, d, centred=mean is not None)
    return wave, (h * xhat.square() if h is not None and op.needs[1] else None), h


@rule("NativeLayerNormBackward0")
def layer_norm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = γ (x - μ)/σ + β along the last axes: a closed form in O(features), see rules/normalization.py."""
    return affine_normalized(op, g, h, op.input, op.result1, op.result2, op.weight, _last(op.normalized_shape))


@rule("FusedRmsNormBackward0")
def rms_norm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = γ x/σ along the last axes, σ² = mean x² + ε: a closed form in O(features)."""
    return affine_normalized(op, g, h, op.input, None, op.result1, op.weight, _last(op.normalized_shape))


def _last(shape: Sequence[int]) -> Dims:
    return list(range(-len(shape), 0))


@rule("NativeGroupNormBackward0")
def group_norm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = γ (x - μ)/σ + β over the channels of a group and all positions: a closed form in O(features)."""
    split = (op.N, op.group, op.C // op.group, op.HxW)  # samples, groups, channels of a group, positions
    x, g, h = (None if t is None else t.reshape(split) for t in (op.input, g, h))
    assert x is not None
    gamma = None if op.weight is None else op.weight.view(1, *split[1:3], 1)
    mean, rstd = (t.view(*split[:2], 1, 1) for t in (op.result1, op.result2))
    wave, *parameters = affine_normalized(op, g, h, x, mean, rstd, gamma, (2, 3))
    of_gamma, of_beta = (None if t is None else t.sum((0, 3)).flatten() for t in parameters)
    return None if wave is None else wave.view(op.input.shape), of_gamma, of_beta


@rule(
    "NativeBatchNormBackward0",
    "NativeBatchNormLegitBackward0",
    "NativeBatchNormLegitBackward1",
    "NativeBatchNormLegitNoTrainingBackward0",
    "BatchNormNoUpdateBackward0",
    "BatchNormWithUpdateBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
)
def batch_norm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = γ (x - μ)/σ + β over samples and positions, a closed form in O(entries); with running statistics h γ²/σ²."""
    x = op.input
    per_channel = [1, -1] + [1] * (x.dim() - 2)
    dims = [0, *range(2, x.dim())]
    gamma = None if op.weight is None else op.weight.view(per_channel)
    if op.result1.numel():  # batch statistics are saved only when they were used
        mean, rstd = op.result1.view(per_channel), op.result2.view(per_channel)
        wave, of_gamma, of_beta = affine_normalized(op, g, h, x, mean, rstd, gamma, dims)
    elif h is None:
        return None, None, None
    else:
        rstd = (op.running_var + op.eps).rsqrt().view(per_channel)
        wave = h * (rstd if gamma is None else rstd * gamma).square() if op.needs[0] else None
        of_gamma = h * ((x - op.running_mean.view(per_channel)) * rstd).square() if op.needs[1] else None
        of_beta = h
    of_gamma = None if of_gamma is None else of_gamma.sum(dims)
    return wave, of_gamma, (of_beta.sum(dims) if of_beta is not None and op.needs[2] else None)


@rule("WeightNormInterfaceBackward0")
def weight_norm(op: Operation, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """y = γ v/‖v‖, the norm of each slice: RMS norm with d = 1; h_γ = h v²/‖v‖²."""
    dims = [i for i in range(op.v.dim()) if i != op.dim % op.v.dim()]
    rstd = op.result1.reciprocal()
    vhat = op.v * rstd
    w = None if h is None else h * op.g.square()
    wave = normalized(vhat, rstd, w, None if g is None else g * op.g, dims, 1, centred=False) if op.needs[0] else None
    return wave, (None if h is None else h * vhat.square())
