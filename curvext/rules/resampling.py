"""Interpolation: y = A x with small matrices A, one for each dimension, so h_x = (A∘A)ᵀ h, one dimension at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .default import default
from .structure import selection

aten = torch.ops.aten
Waves = Any

selection(
    "UpsampleNearest1DBackward0",
    "UpsampleNearest2DBackward0",
    "UpsampleNearest3DBackward0",
    "UpsampleNearestExact1DBackward0",
    "UpsampleNearestExact2DBackward0",
    "UpsampleNearestExact3DBackward0",
)

RESAMPLE = {
    "UpsampleLinear1DBackward0": aten.upsample_linear1d,
    "UpsampleBilinear2DBackward0": aten.upsample_bilinear2d,
    "UpsampleBilinear2DAaBackward0": aten._upsample_bilinear2d_aa,
    "UpsampleBicubic2DBackward0": aten.upsample_bicubic2d,
    "UpsampleBicubic2DAaBackward0": aten._upsample_bicubic2d_aa,
    "UpsampleTrilinear3DBackward0": aten.upsample_trilinear3d,
}
if hasattr(aten, "_upsample_lanczos2d_aa"):
    RESAMPLE["UpsampleLanczos2DAaBackward0"] = aten._upsample_lanczos2d_aa


@rule(*RESAMPLE, linear=True)
def separable(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = (A ⊗ B ⊗ ...) x: h_x = ((A∘A) ⊗ (B∘B) ⊗ ...)ᵀ h."""
    if h is None:
        return None
    sizes, n = op.self_sym_sizes[2:], len(op.output_size)
    scales = [getattr(op, name) for name in {1: ("scales",), 2: _HW, 3: ("scales_d", *_HW)}[n]]
    for d in range(n):
        # resampling the identity, laid along the last dimension, gives A, [in, out]
        basis = torch.eye(sizes[d], dtype=h.dtype, device=h.device).view(1, sizes[d], *[1] * (n - 1), sizes[d])
        to, scale = [1] * (n - 1) + [op.output_size[d]], [None] * (n - 1) + [scales[d]]
        matrix = RESAMPLE[op.name](basis, to, op.align_corners, *scale).view(sizes[d], -1)
        h = torch.movedim(torch.tensordot(h, matrix.square(), ([d + 2], [1])), -1, d + 2)
    return h


_HW = ("scales_h", "scales_w")


@rule("AffineGridGeneratorBackward0", "CudnnAffineGridGeneratorBackward0", linear=True)
def affine_grid(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = θ p for every position p = (x, y, 1): h_θ = Σ_p h pᵀ∘pᵀ."""
    if h is None:
        return None
    n = h.shape[-1]
    theta = torch.zeros(n + 1, n, n + 1, dtype=h.dtype, device=h.device)
    theta[:, 0] = torch.eye(n + 1, dtype=h.dtype, device=h.device)  # so that output k is coordinate k
    if op.name.startswith("Cudnn"):
        size, align_corners = (op.N, op.C, op.H, op.W), True
    else:
        size, align_corners = op.size, op.align_corners
    positions = aten.affine_grid_generator(theta, (n + 1, *size[1:]), align_corners)[..., 0].flatten(1)
    return torch.einsum("npd,kp->ndk", h.flatten(1, -2), positions.square())


class Sampling(NamedTuple):
    """What a grid sampler saved; cuDNN's has one setting alone."""

    image: Tensor
    grid: Tensor
    mode: int = 0  # linear, nearest, cubic
    padding_mode: int = 0  # zeros, border, reflection
    align_corners: bool = True

    @classmethod
    def of(cls, op: Operation) -> Sampling:
        if op.name.startswith("Cudnn"):
            return cls(op.self, op.grid)
        return cls(op.input, op.grid, op.interpolation_mode, op.padding_mode, op.align_corners)


@rule(
    "CudnnGridSamplerBackward0",
    "GridSampler2DBackward0",
    "GridSampler2DCpuFallbackBackward0",
    "GridSampler3DBackward0",
)
def grid_sample(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = Σ w(grid) x over the corners of a cell: h_x = Σ w² h, h_grid = Σ (∂y/∂grid)² h; linear along each axis."""
    s = Sampling.of(op)
    if s.mode == 2:  # taps may coincide at the border
        return default(op, None if g is None else [g], None if h is None else [h])
    if h is None:
        return None
    if s.mode == 1:
        return op.vjp(h)[0], None
    return _onto_image(s, h) if op.needs[0] else None, _onto_grid(s, h) if op.needs[1] else None


def _onto_image(s: Sampling, h: Tensor) -> Tensor:
    wave = torch.zeros_like(s.image, memory_format=torch.contiguous_format).flatten(2)
    for index, weights, _ in _corners(s):
        weight = torch.stack(weights).prod(0)
        index = index.unsqueeze(1).expand(h.shape).flatten(2)
        wave.scatter_add_(2, index, (weight.square().unsqueeze(1) * h).flatten(2))
    return wave.view(s.image.shape)


def _onto_grid(s: Sampling, h: Tensor) -> Tensor:
    n = s.image.dim() - 2
    slopes: list[Any] = [0.0] * n
    for index, weights, moves in _corners(s):
        values = s.image.flatten(2).gather(2, index.unsqueeze(1).expand(h.shape).flatten(2)).view(h.shape)
        for d in range(n):
            parts = [moves[k] if k == d else weights[k] for k in range(n)]
            slopes[d] = slopes[d] + torch.stack(parts).prod(0).unsqueeze(1) * values
    # the grid lists its coordinates from the last dimension to the first
    return torch.stack([(slope.square() * h).sum(1) for slope in reversed(slopes)], -1)


def _corners(s: Sampling) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
    """For each corner of the cells: its flat index, and by dimension its weight and how that moves with the grid."""
    sizes = s.image.shape[2:]
    taps = [_taps(s.grid[..., len(sizes) - 1 - d], size, s) for d, size in enumerate(sizes)]
    for choice in product((0, 1), repeat=len(sizes)):
        flat, weights, moves = torch.zeros_like(s.grid[..., 0], dtype=torch.long), [], []
        for d, side in enumerate(choice):
            index, weight, move = taps[d][side]
            flat = flat * sizes[d] + index
            weights.append(weight)
            moves.append(move)
        yield flat, weights, moves


def _taps(grid: Tensor, size: int, s: Sampling) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The two neighbours of a coordinate along one dimension: index, weight, derivative of the weight."""
    x, slope = _position(grid, size, s.padding_mode, s.align_corners)
    lower = x.floor()
    t = x - lower
    taps = []
    for index, weight, move in ((lower, 1 - t, -slope), (lower + 1, t, slope)):
        inside = ((index >= 0) & (index < size)).to(x.dtype)
        taps.append((index.clamp(0, size - 1).long(), weight * inside, move * inside))
    return taps


def _position(grid: Tensor, size: int, padding_mode: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Where a coordinate from -1 to 1 falls among the pixels, and the size of the derivative."""
    stretch = (size - 1) / 2 if align_corners else size / 2
    x = (grid + 1) / 2 * (size - 1) if align_corners else ((grid + 1) * size - 1) / 2
    slope = torch.full_like(x, stretch)
    if padding_mode == 2:  # reflection about the outermost pixels, or about their outer edges
        low, span = (0.0, float(size - 1)) if align_corners else (-0.5, float(size))
        if span == 0:
            return torch.zeros_like(x), torch.zeros_like(x)
        away = (x - low).abs()
        rest, flips = away.remainder(span), (away / span).floor()
        x = torch.where(flips % 2 == 0, rest, span - rest) + low
    if padding_mode:
        slope = slope * ((x > 0) & (x < size - 1))
        x = x.clamp(0, size - 1)
    return x, slope
