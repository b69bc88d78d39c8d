"""Normalisations: y = γ x̂ + β, where x̂ is x divided by its scale along some axes, mostly after removing its mean there.

With x̂ = (x - μ)/σ over d entries (σ² = var + ε, so that ∂σ/∂x = x̂/d),

    ∂x̂ᵢ/∂xⱼ = (δᵢⱼ - 1/d - x̂ᵢ x̂ⱼ/d)/σ,      Jᵀu = (u - ū - s x̂)/σ  with  s = Σ u x̂ / d.

Squaring the first and differentiating the second gives both terms of equation (2) from a few sums over the axes: the
cost of the gradient. Without the mean (RMS norm, weight norm) the terms 1/d and ū are absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..axes import apart
from ..graph import Operation
from ..persample import Dense, PerSample
from ..registry import rule
from .tangents import Tangents, added, broadcast

Waves = tuple[Tensor | None, Tensor | None, Tensor | None]
Dims = list[int] | tuple[int, ...]
BLOCK = 1 << 17  # entries that a CPU computes together: half a megabyte in float32


def normalized(
    xhat: Tensor, rstd: Tensor, w: Tensor | None, u: Tensor | None, dims: Dims, d: int, centred: bool = True
) -> Tensor:
    """Equation (2) across x̂ = (x - μ)/σ, with sums Σ over the axes and s = Σux̂/d:

        σ² h_x = w (1 - 2/d) - 2 (u x̂ + w x̂²)/d + a + x̂ (b + c x̂),
        a = Σw/d² - s (1 - 1/d),    b = 2 (Σwx̂ + Σu)/d²,    c = Σwx̂²/d² + 3s/d.

    Without the mean: w instead of w (1 - 2/d), a = -s and b = 0.

    Args:
        xhat, rstd: the normalised x, and 1/σ.
        w, u: wave and gradient at x̂; not both ``None``.
        dims: the axes, of ``d`` entries together. For σ = ‖x‖ instead of a root mean square, d is 1.
        centred: whether the mean was removed.
    """
    wave: Any = None
    a: Any = 0.0
    b: Any = 0.0
    c: Any = 0.0
    if u is not None:
        wave = u * xhat
        s = wave.sum(dims, keepdim=True) / d
        a, c = -s, s * (3 / d)
        if centred:
            a, b = a + s / d, u.sum(dims, keepdim=True) * (2 / d**2)
    if w is not None:
        wx = w * xhat
        if centred:
            a, b = a + w.sum(dims, keepdim=True) / d**2, b + wx.sum(dims, keepdim=True) * (2 / d**2)
        wx = wx.mul_(xhat)
        c = c + wx.sum(dims, keepdim=True) / d**2
        wave = wx if wave is None else wave.add_(wx)
    wave = wave.mul_(-2 / d)  # large tensors in place: this is memory traffic above all
    if w is not None:
        wave = wave.add_(w, alpha=1 - 2 / d if centred else 1)
    scale = rstd.square()
    inner = xhat * (c * scale)
    inner = inner.add_(b * scale) if centred else inner
    return wave.mul_(scale).addcmul_(inner, xhat).add_(a * scale)


@dataclass(frozen=True)
class Axes:
    """Of x as a rule views it: the axes that are normalised, those that share γ, and one to go along in blocks."""

    normalized: Dims
    shared: Dims
    blocks: int = 0


def affine_normalized(op: Operation, axes: Axes, *tensors: Any) -> tuple[Tensor | None, Tensor | None]:
    """Equation (2) across y = γ x̂ + β, for x and γ; some slices at a time, so that intermediate results stay in cache.

    Args:
        tensors: g, h, x, the mean (or ``None``), 1/σ and γ, all broadcastable to x.
    """
    x = tensors[2]
    axis, n = axes.blocks, x.shape[axes.blocks]
    size = max(1, n * BLOCK // max(x.numel(), 1)) if x.is_cpu else n
    if size >= n or not (op.needs[0] or op.needs[1]):
        return _block(op, axes, *tensors)
    whole = torch.empty_like(x) if op.needs[0] else None
    of_gamma = []
    for start in range(0, n, size):
        length = min(size, n - start)
        parts = (t if t is None or t.shape[axis] < n else t.narrow(axis, start, length) for t in tensors)
        wave, part = _block(op, axes, *parts)
        of_gamma.append(part)
        if whole is not None and wave is not None:
            whole.narrow(axis, start, length).copy_(wave)
    return whole, _joined(of_gamma, axis, axis in axes.shared)


def _joined(parts: list[Tensor | None], axis: int, shared: bool) -> Tensor | None:
    """What the blocks give γ: added up if they share it, else side by side."""
    present = [t for t in parts if t is not None]
    if not present:
        return None
    return sum(present[1:], start=present[0]) if shared else torch.cat(present, axis)


def _block(
    op: Operation,
    axes: Axes,
    g: Tensor | None,
    h: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    gamma: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The waves of x and γ, where h_γ = h x̂²."""
    xhat = x * rstd if mean is None else (x - mean).mul_(rstd)
    wave = None
    if op.needs[0]:
        w = h if h is None or gamma is None else h * gamma.square()
        u = g if g is None or gamma is None else g * gamma
        d = max(x.numel() // max(rstd.numel(), 1), 1)
        wave = normalized(xhat, rstd, w, u, axes.normalized, d, centred=mean is not None)
    if h is None or not op.needs[1]:
        return wave, None
    return wave, xhat.square_().mul_(h).sum(axes.shared, keepdim=True)


def fixed(op: Operation) -> bool:
    """Whether x is: y is linear in γ and β."""
    return not op.needs[0]


@rule("NativeLayerNormBackward0", linear=fixed, additive=fixed)
def layer_norm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = γ (x - μ)/σ + β along the last axes: a closed form in O(features), see rules/normalization.py."""
    return *_along_last(op, g, h, op.result1, op.result2), h


@rule("FusedRmsNormBackward0", linear=fixed, additive=fixed)
def rms_norm(op: Operation, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """y = γ x/σ along the last axes, σ² = mean x² + ε: a closed form in O(features)."""
    return _along_last(op, g, h, None, op.result1)


def _along_last(
    op: Operation, g: Tensor | None, h: Tensor | None, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    shape, rows = list(op.normalized_shape), rstd.numel()
    entries = (None if t is None else t.reshape(rows, *shape) for t in (g, h, op.input))
    statistics = (None if t is None else t.view(rows, *[1] * len(shape)) for t in (mean, rstd))
    gamma = None if op.weight is None else op.weight.unsqueeze(0)
    axes = Axes(tuple(range(1, len(shape) + 1)), (0,))
    wave, of_gamma = affine_normalized(op, axes, *entries, *statistics, gamma)
    return (None if wave is None else wave.reshape(op.input.shape)), (None if of_gamma is None else of_gamma[0])


@rule("NativeGroupNormBackward0", linear=fixed, additive=fixed)
def group_norm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = γ (x - μ)/σ + β over the channels of a group and all positions: a closed form in O(features)."""
    split = (op.N, op.group, op.C // op.group, op.HxW)  # samples, groups, channels of a group, positions
    x, g, h = (None if t is None else t.reshape(split) for t in (op.input, g, h))
    gamma = None if op.weight is None else op.weight.view(1, *split[1:3], 1)
    mean, rstd = (t.view(*split[:2], 1, 1) for t in (op.result1, op.result2))
    wave, of_gamma = affine_normalized(op, Axes((2, 3), (0, 3)), g, h, x, mean, rstd, gamma)
    of_beta = h.sum((0, 3)).flatten() if h is not None and op.needs[2] else None
    return (None if wave is None else wave.reshape(op.input.shape)), _flat(of_gamma), of_beta


def _flat(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.flatten()


def by_running_statistics(op: Operation) -> bool:
    """Whether running statistics were used (then those of the batch are not saved): y is linear in x too."""
    return not op.result1.numel()


@rule(
    "NativeBatchNormBackward0",
    "NativeBatchNormLegitBackward0",
    "NativeBatchNormLegitBackward1",
    "NativeBatchNormLegitNoTrainingBackward0",
    "BatchNormNoUpdateBackward0",
    "BatchNormWithUpdateBackward0",
    "CudnnBatchNormBackward0",
    "MiopenBatchNormBackward0",
    linear=lambda op: fixed(op) or by_running_statistics(op),
    additive=fixed,
)
def batch_norm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = γ (x - μ)/σ + β over samples and positions, a closed form in O(entries); with running statistics h γ²/σ²."""
    x = op.input
    dims = (0, *range(2, x.dim()))
    if by_running_statistics(op):
        wave, of_gamma = _with_running_statistics(op, h, dims)
    else:
        mean, rstd, gamma = (_per_channel(t, x) for t in (op.result1, op.result2, op.weight))
        wave, of_gamma = affine_normalized(op, Axes(dims, dims, blocks=1), g, h, x, mean, rstd, gamma)
    return wave, _flat(of_gamma), (h.sum(dims) if h is not None and op.needs[2] else None)


def _with_running_statistics(op: Operation, h: Tensor | None, dims: Dims) -> tuple[Tensor | None, Tensor | None]:
    """Linear in x: h_x = h γ²/σ², h_γ = Σ h x̂²."""
    if h is None:
        return None, None
    rstd = (op.running_var + op.eps).rsqrt()
    slope = rstd if op.weight is None else rstd * op.weight
    wave = h * _per_channel(slope.square(), h) if op.needs[0] else None
    if not op.needs[1]:
        return wave, None
    centred = op.input - _per_channel(op.running_mean, h)
    return wave, centred.square_().mul_(h).sum(dims) * rstd.square()


def _per_channel(t: Tensor | None, x: Tensor) -> Any:
    """One value a channel, so that it broadcasts over x."""
    return None if t is None else t.view(1, -1, *[1] * (x.dim() - 2))


@rule("WeightNormInterfaceBackward0")
def weight_norm(op: Operation, g: Tensor | None, h: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """y = γ v/‖v‖, the norm of each slice: RMS norm with d = 1; h_γ = h v²/‖v‖²."""
    dims = [i for i in range(op.v.dim()) if i != op.dim % op.v.dim()]
    rstd = op.result1.reciprocal()
    vhat = op.v * rstd
    w = None if h is None else h * op.g.square()
    wave = normalized(vhat, rstd, w, None if g is None else g * op.g, dims, 1, centred=False) if op.needs[0] else None
    return wave, (None if h is None else h * vhat.square())


ROWS = ("NativeLayerNormBackward0", "FusedRmsNormBackward0")
BATCHES = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
CHANNELS = ("NativeGroupNormBackward0", *BATCHES)


@rule("NativeLayerNormBackward0", wave="factor")
def layer_norm_factor(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """S_x by the kernel of the backward pass, of all columns in one batch."""
    if any(wanted[1:]):
        return None
    shape = op.normalized_shape
    x, mean, rstd = (_every(t, len(s), t.shape[t.dim() - len(shape) :]) for t in (op.input, op.result1, op.result2))
    settings = (shape, mean, rstd, op.weight, op.bias, [True, False, False])
    found = torch.ops.aten.native_layer_norm_backward(s.reshape(x.shape), x, *settings)
    return found[0].view(s.shape), None, None


@rule("NativeGroupNormBackward0", wave="factor")
def group_norm_factor(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """S_x by the kernel of the backward pass, of all columns in one batch."""
    if any(wanted[1:]):
        return None
    x, mean, rstd = (_every(t, len(s), t.shape[1:]) for t in (op.input, op.result1, op.result2))
    settings = (mean, rstd, op.weight, len(s) * op.N, op.C, op.HxW, op.group, [True, False, False])
    found = torch.ops.aten.native_group_norm_backward(s.reshape(x.shape).contiguous(), x, *settings)
    return found[0].view(s.shape), None, None


def _every(t: Tensor, v: int, inner: Sequence[int]) -> Tensor:
    """The same for each of V columns, ``[V·*, *inner]``, contiguous, as kernels take it to be."""
    return t.expand(v, *t.shape).reshape(-1, *inner).contiguous()


@rule(*BATCHES, wave="factor")
def batch_norm_factor(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """With running statistics S_x = γ S/σ; with those of the batch it is left to the node."""
    if any(wanted[1:]) or not by_running_statistics(op):
        return None
    rstd = (op.running_var + op.eps).rsqrt()
    return s * _per_channel(rstd if op.weight is None else rstd * op.weight, op.input), None, None


@rule(*ROWS, *CHANNELS, wave="shared")
def normalization_shared(op: Operation, s: Tensor, wanted: Sequence[bool]) -> dict[int, PerSample]:
    """γ gets Σ S x̂ over a sample's positions, β gets Σ S."""
    axis, n, channels = op.axes_out[0], op.n_samples, op.name in CHANNELS
    if wanted[0] or (channels and axis.dim == 1):
        return {}
    found: dict[int, PerSample] = {}
    for i, want in enumerate(wanted):
        if want:
            shape, dtype = op.inputs[i].shape, op.inputs[i].dtype
            along = (*shape, *[1] * (s.dim() - 3)) if channels else shape
            products = (s * _xhat(op) if i == 1 else s).to(dtype)
            found[i] = Dense(apart(products, axis, n, along).view(len(s), -1, *shape))
    return found


def _xhat(op: Operation) -> Tensor:
    """(x - μ)/σ, or x/σ."""
    x = op.input
    if op.name in ROWS:
        return x * op.result1 if op.name == "FusedRmsNormBackward0" else (x - op.result1) * op.result2
    if op.name == "NativeGroupNormBackward0":
        mean, rstd = (t.view(*t.shape, 1, 1) for t in (op.result1, op.result2))
        return ((x.reshape(op.N, op.group, -1, op.HxW) - mean) * rstd).view(x.shape)
    running = by_running_statistics(op)
    mean, rstd = (op.running_mean, (op.running_var + op.eps).rsqrt()) if running else (op.result1, op.result2)
    return (x - _per_channel(mean, x)) * _per_channel(rstd, x)


@rule(*ROWS, *CHANNELS, wave="tangent")
def normalization_tangent(op: Operation, t: Tangents) -> Tensor | None:
    """t_y = γ J t_x + x̂ t_γ + t_β with J = ∂x̂/∂x; for the statistics of a batch it is left to the node."""
    if op.name in BATCHES and not by_running_statistics(op):
        return None
    x, gamma, beta = [*t, None][:3]

    def wide(p: Tensor) -> Tensor:
        return broadcast(p if op.name in ROWS else p.view(*p.shape, *[1] * (op.input.dim() - 2)), op)

    if x is not None:
        x = _normalized_tangent(op, x)
        x = x if op.weight is None else x * wide(op.weight.unsqueeze(0))
    return added(x, None if gamma is None else _xhat(op) * wide(gamma), None if beta is None else wide(beta))


def _normalized_tangent(op: Operation, t: Tensor) -> Tensor:
    """J t = (t - mean t - x̂ mean(x̂t))/σ over the entries that are normalised together; t/σ with running statistics."""
    if op.name in BATCHES:
        return t * _per_channel((op.running_var + op.eps).rsqrt(), op.input)
    centred = op.name != "FusedRmsNormBackward0"
    rstd = op.result2 if centred else op.result1
    xhat = _xhat(op).reshape(rstd.numel(), -1)
    t = t.reshape(len(t), *xhat.shape)
    along = xhat * (t * xhat).mean(-1, keepdim=True)
    along = along + t.mean(-1, keepdim=True) if centred else along
    return (t - along).mul_(rstd.view(-1, 1)).view(-1, *op.input.shape)
