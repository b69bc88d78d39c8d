"""Complex tensors count as pairs of real ones: the wave of x = a + ib is h_a + i h_b. Only these rules see them.

The slopes of y = u + iv come from two products: Jᵀ1 = (∂u/∂a) + i (∂u/∂b) and Jᵀi = (∂v/∂a) + i (∂v/∂b).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .structure import bending, factor_fixed, select

Waves = Any

rule("ViewAsRealBackward0", "ViewAsRealBackward0_copy", "ViewAsComplexBackward0", "ComplexBackward0", wave="complex")(
    select
)


@rule(
    *("ConjBackward0", "ConjPhysicalBackward0", "ConjPhysicalBackward1"),
    *("NegViewBackward0", "NegBackward0"),
    wave="complex",
    linear=True,
)
def sign(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """Only signs change: h_x = h."""
    return h


@rule(
    *("AbsBackward0", "AcosBackward0", "AcoshBackward0", "AddBackward0", "AddBackward1", "AngleBackward0"),
    *("AsinBackward0", "AsinhBackward0", "AtanBackward0", "AtanhBackward0", "CosBackward0", "CoshBackward0"),
    *("DivBackward0", "DivBackward1", "ExpBackward0", "LogBackward0", "Log1PBackward0", "Log2Backward0"),
    *("Log10Backward0", "MulBackward0", "MulBackward1"),
    *("PolarBackward0", "PowBackward0", "PowBackward1", "PowBackward2", "ReciprocalBackward0", "RsqrtBackward0"),
    *("RsubBackward0", "RsubBackward1", "SgnBackward0", "SigmoidBackward0", "SinBackward0"),
    *("SinhBackward0", "SqrtBackward0", "SubBackward0", "TanBackward0", "TanhBackward0"),
    wave="complex",
    how="structure",
    coincident=True,
)
def pointwise_complex(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """Each input entry feeds one output entry: h_a = (∂u/∂a)² h_u + (∂v/∂a)² h_v + ∂(Jᵀg)_a/∂a, h_b likewise."""
    waves: list[Any] = [None] * len(op.edges)
    for unit, part in _parts(h):
        slopes, pulled = op.vjp(unit * torch.ones_like(part)), op.vjp(unit * part)
        for group in op.groups:
            if slopes[group[0]] is not None:
                wave = _times(_total(slopes, group), _total(pulled, group))
                waves[group[0]] = wave if waves[group[0]] is None else waves[group[0]] + wave
    if g is not None:
        along_b = bending(op, g, _imaginary)
        for i, bend in bending(op, g).items():
            bend = torch.complex(bend.real, along_b[i].imag) if bend.is_complex() else bend
            waves[i] = bend if waves[i] is None else op.reduced(waves[i], i) + bend
    return waves


def _parts(h: Tensor | None) -> Iterator[tuple[complex, Tensor]]:
    if h is not None and h.is_complex():
        yield 1, torch.complex(h.real, torch.zeros_like(h.real))
        yield 1j, torch.complex(h.imag, torch.zeros_like(h.imag))
    elif h is not None:
        yield 1, h


def _total(rows: Sequence[Tensor | None], group: list[int]) -> Tensor:
    return sum(rows[i] for i in group)  # type: ignore[misc, return-value]


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product of two pairs, part by part."""
    return torch.complex(a.real * b.real, a.imag * b.imag) if a.is_complex() else a * b


def _imaginary(like: Tensor) -> Tensor:
    return torch.full_like(like, 1j) if like.is_complex() else torch.ones_like(like)


@rule("MmBackward0", "BmmBackward0", wave="complex", linear=True)
def matmul(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """Y = A B: h_A from h and B, h_B from A and h, each by :func:`_mixed`."""
    if h is None:
        return None
    a = _mixed(h, op.mat2.mT) if op.needs[0] else None
    return a, (_mixed(h.mT, op.self).mT if op.needs[1] else None)


@rule("AddmmBackward0", wave="complex", linear=True, additive=factor_fixed(1, 2))
def addmm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """Y = β C + α A B, β and α real or complex."""
    if h is None:
        return None
    alpha, beta = (torch.tensor(factor, dtype=h.dtype, device=h.device) for factor in (op.alpha, op.beta))
    c = _mixed(h, beta, torch.mul) if op.needs[0] else None
    a = _mixed(h, alpha * op.mat2.mT) if op.needs[1] else None
    return c, a, (_mixed(h.mT, alpha * op.mat1).mT if op.needs[2] else None)


def _mixed(h: Tensor, b: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Tensor:
    """Through y = x b with a fixed b = r + is: h_u r² + h_v s² is the wave of Re x, h_u s² + h_v r² that of Im x."""
    r, s = b.real.square(), b.imag.square()
    return torch.complex(
        multiply(h.real, r) + multiply(h.imag, s),
        multiply(h.real, s) + multiply(h.imag, r),
    )


@rule("FftC2CBackward0", wave="complex", linear=True)
def fft(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = c Σ e^{-iθ} x: h_a = c² Σ (cos²θ h_u + sin²θ h_v), h_b = c² Σ (sin²θ h_u + cos²θ h_v), by one transform.

    For θ = 2πkn/N, cos²θ = (1 + cos 2θ)/2, and cos 2θ is the real part of the kernel at 2n mod N.
    """
    if h is None:
        return None
    return _both_parts(op, h, [h.shape[d] for d in op.dim])


@rule("FftR2CBackward0", wave="complex", linear=True)
def rfft(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """Half of the spectrum of a real signal: as the full transform with h = 0 in the other half."""
    if h is None:
        return None
    last, sizes = op.dim[-1], [op.inputs[0].shape[d] for d in op.dim]
    missing = sizes[-1] - h.shape[last]
    zeros = h.new_zeros([missing if d == last else size for d, size in enumerate(h.shape)])
    return _both_parts(op, torch.cat([h, zeros], last), sizes).real


@rule("FftC2RBackward0", wave="complex", linear=True)
def irfft(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = c Σ w Re(x e^{iθ}) over half a spectrum, w = 2 but for the frequencies that mirror themselves: w² c² Σ ..."""
    if h is None:
        return None
    last, sizes = op.dim[-1], [h.shape[d] for d in op.dim]
    half = op.inputs[0].shape[last]
    k = torch.arange(half, device=h.device)
    w = (
        torch.where((k == 0) | (2 * k == sizes[-1]), 1.0, 2.0)
        .to(h.dtype)
        .view([-1] + [1] * (h.dim() - 1 - last % h.dim()))
    )
    full = _both_parts(op, torch.complex(h, torch.zeros_like(h)), sizes)
    return full.narrow(last, 0, half) * w.square()


def _both_parts(op: Operation, h: Tensor, sizes: Sequence[int]) -> Tensor:
    """c² Σ (cos²θ h_u + sin²θ h_v) + i c² Σ (sin²θ h_u + cos²θ h_v) over the transformed dimensions."""
    total = (h.real + h.imag).sum(op.dim, keepdim=True)
    cosines = torch.fft.fftn(h.real - h.imag, dim=op.dim).real
    for d, size in zip(op.dim, sizes, strict=True):
        cosines = cosines.index_select(d, 2 * torch.arange(size, device=h.device) % size)
    factor = prod(sizes) ** -float(op.normalization) / 2  # 0: none, 1: by the root of N, 2: by N
    return torch.complex(total + cosines, total - cosines) * factor
