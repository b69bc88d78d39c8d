"""Reductions: sums, means, moments, products, norms, extrema, orders, cumulative operations and distances.

Nearly all of them feed an input entry into one output entry, so that J∘J and the second term of (2) are elementwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..graph import Operation
from ..hessians import LossHessian, SoftmaxHessian
from ..registry import rule
from .default import default
from .structure import bent, scale, selection

# sums, and entries taken by value
selection(
    "CummaxBackward0",
    "CumminBackward0",
    "CumsumBackward0",
    "KthvalueBackward0",
    "MaxBackward0",
    "MedianBackward1",
    "MinBackward0",
    "ModeBackward0",
    "NanmedianBackward1",
    "NansumBackward0",
    "SortBackward0",
    "SortBackward1",
    "SumBackward0",
    "SumBackward1",
    "TopkBackward0",
    "TraceBackward0",
)


Slope = Callable[[Operation], Tensor | None]
Bend = Callable[[Operation, Tensor], Tensor | None]


def reduced_dims(op: Operation) -> list[int]:
    """The dimensions of the input that the operation reduces."""
    ndim, dim = len(op.inputs[0].shape), getattr(op, "dim", None)
    if dim is None or dim == ():
        return list(range(ndim))
    dims = (dim,) if isinstance(dim, int) else dim
    return [d % ndim for d in dims] if ndim else []


def kept(op: Operation, wave: Tensor) -> Tensor:
    """A tensor of the output's shape with the reduced dimensions kept, so that it broadcasts over the input."""
    dims = reduced_dims(op)
    return wave.reshape([1 if i in dims else n for i, n in enumerate(op.inputs[0].shape)])


def _reduced_entries(op: Operation) -> int:
    """How many entries are reduced to one."""
    return max(int(prod(op.inputs[0].shape)) // max(int(prod(op.outputs[0].shape)), 1), 1)


def _slope(op: Operation) -> Tensor | None:
    """∂y/∂x of each input entry, Jᵀ1, as autograd has it (ties share, zeros at kinks, none for p = 0)."""
    return op.vjp(torch.ones_like(op.result))[0]


def _fed(op: Operation, slope: Tensor, bend: Tensor | None, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """Each entry of x feeds one entry of y: h_x = (∂y/∂x)² h + ∂²y/∂x² g."""
    pulled = None if h is None else slope.square() * kept(op, h)
    return pulled if bend is None or g is None else bent(pulled, bend, kept(op, g))


def reduction(*names: str, d1: Slope, d2: Bend | None = None, linear: bool = False) -> None:
    """Each entry of x feeds one entry of y. ``d1(op)`` is ∂y/∂x; ``d2(op, ∂y/∂x)`` is ∂²y/∂x², zero if absent."""

    def reduction_rule(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
        """Each entry of x feeds one entry of y: h_x = (∂y/∂x)² h + ∂²y/∂x² g."""
        if h is None and (d2 is None or g is None):
            return None
        slope = d1(op)
        if slope is None:
            return None
        return _fed(op, slope, None if d2 is None or g is None else d2(op, slope), g, h)

    rule(*names, linear=linear)(reduction_rule)


# products are linear in each factor, but not in all together; at ties the slope is shared
reduction("ProdBackward0", "ProdBackward1", d1=_slope)
reduction("AmaxBackward0", "AminBackward0", d1=_slope, linear=True)
reduction("MaxBackward1", "MinBackward1", "MedianBackward0", "NanmedianBackward0", d1=_slope, linear=True)
# y = log Σ eˣ:  p = eˣ⁻ʸ, p - p²
reduction("LogsumexpBackward0", d1=lambda op: (op.self - kept(op, op.result)).exp(), d2=lambda op, p: p - p * p)


@rule("LogsumexpBackward0", wave="source")
def logsumexp_hessian(op: Operation, g: Sequence[Tensor | None]) -> dict[int, LossHessian] | None:
    """B = g (diag p - p pᵀ) along the one dimension that is reduced; the samples are in another."""
    dims = reduced_dims(op)
    if op.summed or len(dims) != 1 or g[0] is None:
        return None
    return {0: SoftmaxHessian((op.self - kept(op, op.result)).exp(), kept(op, g[0]), dims[0])}


@rule("MeanBackward0", "MeanBackward1", linear=True)
@rule("MeanBackward0", "MeanBackward1", wave="complex", linear=True)
def mean(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = Σx / n: h_x = h / n²."""
    return None if h is None else op.vjp(h / _reduced_entries(op))[0]


@rule("SegmentReduceBackward0", linear=lambda op: op.reduce != "prod")
def segment_reduce(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """Sum, mean, product or extremum of segments: (Jᵀ1) ∘ (Jᵀh); even a product is linear in each factor."""
    return scale(op, None, h)


@rule("AminmaxBackward0", outputs="all", linear=True)
def aminmax(op: Operation, g: Any, h: Sequence[Tensor | None] | None) -> Tensor | None:
    """y₁ = min x, y₂ = max x: Σₖ (Jₖᵀ1) ∘ (Jₖᵀhₖ)."""
    if h is None:
        return None
    total: Any = 0.0
    for k, wave in enumerate(h):
        if wave is not None:
            ones, pulled = _to_one(op, k, torch.ones_like(wave)), _to_one(op, k, wave)
            total = total + ones * pulled
    return total


def _to_one(op: Operation, k: int, v: Tensor) -> Any:
    """Jₖᵀ v for output k of two."""
    return op.vjp(v, None)[0] if k == 0 else op.vjp(None, v)[0]


# m = n - correction; ∂(x - μ)/∂x = 1 - 1/n
def _variance_slope(op: Operation) -> Tensor:
    """∂y/∂x = 2 (x - μ)/m."""
    return _centred(op) * 2 / _divisor(op)


def _variance_bend(op: Operation, slope: Tensor) -> Tensor:
    """∂²y/∂x² = 2 (1 - 1/n)/m."""
    n = _reduced_entries(op)
    return torch.full_like(slope, 2 * (1 - 1 / n)) / _divisor(op)


def _deviation_slope(op: Operation) -> Tensor:
    """∂y/∂x = (x - μ)/(m y)."""
    return _centred(op) * _inverse(op) / _divisor(op)


def _deviation_bend(op: Operation, slope: Tensor) -> Tensor:
    """∂²y/∂x² = ((1 - 1/n)/m - (∂y/∂x)²)/y."""
    n = _reduced_entries(op)
    return (torch.full_like(slope, 1 - 1 / n) / _divisor(op) - slope.square()) * _inverse(op)


def _centred(op: Operation) -> Tensor:
    return op.self - op.self.mean(reduced_dims(op), keepdim=True)


def _divisor(op: Operation) -> float:
    return _reduced_entries(op) - (1 if op.correction is None else op.correction)


def _inverse(op: Operation) -> Tensor:
    """1/y for a standard deviation y; zero where y is, as its gradient."""
    y = kept(op, op.result0 if op.name == "StdMeanBackward0" else op.result)
    return (1 / y).masked_fill_(y == 0, 0)


reduction("VarBackward0", d1=_variance_slope, d2=_variance_bend)
reduction("StdBackward0", d1=_deviation_slope, d2=_deviation_bend)


@rule("VarMeanBackward0", "StdMeanBackward0", outputs="all")
def with_mean(op: Operation, g: Any, h: Any) -> Tensor | None:
    """y₁ = variance or deviation, y₂ = mean: (∂y₁/∂x)² h₁ + ∂²y₁/∂x² g₁ + h₂/n²."""
    d1, d2 = (_variance_slope, _variance_bend)
    if op.name == "StdMeanBackward0":
        d1, d2 = (_deviation_slope, _deviation_bend)
    (g1, _), (h1, h2) = g or (None, None), h or (None, None)
    wave = None
    if g1 is not None or h1 is not None:
        slope = d1(op)
        wave = _fed(op, slope, None if g1 is None else d2(op, slope), g1, h1)
    if h2 is not None:
        of_mean = kept(op, h2 / _reduced_entries(op) ** 2)
        wave = of_mean if wave is None else wave + of_mean
    return None if wave is None else wave.expand(op.inputs[0].shape)


def norm_slope(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Of y = (Σ|x|ᵖ)^(1/p):  ∂y/∂x = sign x (|x|/y)ᵖ⁻¹; zero where that is 0/0, one for each of several maxima."""
    if p == 0:
        return torch.zeros_like(x)
    if p == 1:
        return x.sgn()
    if abs(p) == float("inf"):
        return x.sgn() * (x.abs() == y)
    undefined = (y == 0) | (x == 0) if p < 1 else y == 0
    return (x.sgn() * (x.abs() / y) ** (p - 1)).masked_fill_(undefined, 0)


def norm_bend(x: Tensor, y: Tensor, p: float | None, slope: Tensor) -> Tensor | None:
    """Of y = (Σ|x|ᵖ)^(1/p):  ∂²y/∂x² = (p - 1) ((|x|/y)ᵖ⁻² - (∂y/∂x)²)/y; at kinks and poles zero."""
    if p is None or p == 2:
        return ((1 - slope.square()) / y).masked_fill_(y == 0, 0)
    if p in (0, 1) or abs(p) == float("inf"):
        return None
    undefined = (y == 0) | (x == 0) if p < 2 else y == 0
    return ((p - 1) * ((x.abs() / y) ** (p - 2) - slope.square()) / y).masked_fill_(undefined, 0)


def _norm_bend(op: Operation, slope: Tensor) -> Tensor | None:
    y = kept(op, op.result)
    return norm_bend(op.self.to(y.dtype), y, op.p if op.name.startswith("Norm") else op.ord, slope)


reduction("NormBackward0", "NormBackward1", "LinalgVectorNormBackward0", d1=_slope, d2=_norm_bend)


def _of_norm(x: Tensor, y: Tensor, p: float, slope: Tensor, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """(∂y/∂x)² h + ∂²y/∂x² g for norms y that broadcast over x."""
    wave = None if h is None else slope.square() * h
    bend = None if g is None else norm_bend(x, y, p, slope)
    return wave if bend is None or g is None else bent(wave, bend, g)


@rule("ForeachNormBackward0", outputs="all")
def foreach_norm(op: Operation, g: Any, h: Any) -> list[Tensor | None]:
    """yᵢ = ‖xᵢ‖ for each tensor of a list: (∂y/∂x)² h + ∂²y/∂x² g."""
    slopes = op.vjp(*(torch.ones_like(y) for y in op.result))
    absent = [None] * len(slopes)
    return [
        None if slope is None else _of_norm(x.to(y.dtype), y, op.ord, slope, g_, h_)
        for x, y, slope, g_, h_ in zip(op.self, op.result, slopes, g or absent, h or absent, strict=True)
    ]


@rule("DistBackward0")
def dist(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """y = ‖a - b‖ of all entries together: for both, (∂y/∂x)² h + ∂²y/∂x² g."""
    if op.self.shape != op.other.shape:  # one entry of the smaller meets several of the other
        return default(op, [g], [h])
    difference = op.self - op.other
    wave = _of_norm(difference, op.result, op.p, norm_slope(difference, op.result, op.p), g, h)
    return wave, wave


@rule("CdistBackward0", coincident=True)
def cdist(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """yᵢⱼ = ‖aᵢ - bⱼ‖: for aᵢ, Σⱼ (∂y/∂a)² hᵢⱼ + ∂²y/∂a² gᵢⱼ; for bⱼ the sum over i."""
    wave = _of_distances(op, op.x1.unsqueeze(-2) - op.x2.unsqueeze(-3), g, h)
    return None if wave is None else (wave.sum(-2), wave.sum(-3))


@rule("PdistBackward0")
def pdist(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = ‖xᵢ - xⱼ‖ for i < j: a pair gives both of its rows (∂y/∂x)² h + ∂²y/∂x² g."""
    x = op.self
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    wave = _of_distances(op, x[i] - x[j], g, h)
    return None if wave is None else torch.zeros_like(x).index_add(0, i, wave).index_add(0, j, wave)


def _of_distances(op: Operation, difference: Tensor, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """The wave at the differences, whose norms along the last axis are the distances."""
    y, p = op.result.unsqueeze(-1), op.p
    g, h = (None if t is None else t.unsqueeze(-1) for t in (g, h))
    return _of_norm(difference, y, p, norm_slope(difference, y, p), g, h)


@rule("EuclideanDistBackward0")
def euclidean_dist(op: Operation, g: Tensor | None, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """yᵢⱼ = ‖aᵢ - bⱼ‖, w = (h - g/y)/y²: for aᵢ, Σⱼ wᵢⱼ (aᵢ - bⱼ)² + gᵢⱼ/yᵢⱼ, in matrix products."""
    inverse = (1 / op.result).masked_fill_(op.result == 0, 0)
    linear: Any = 0.0 if g is None else g * inverse
    w = ((0.0 if h is None else h) - linear) * inverse.square()
    linear = torch.zeros_like(w) if g is None else linear
    return _squared_distances(w, linear, op.x1, op.x2), _squared_distances(w.mT, linear.mT, op.x2, op.x1)


def _squared_distances(w: Tensor, linear: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σⱼ wᵢⱼ (aᵢ - bⱼ)² + linearᵢⱼ; less is cancelled the nearer the origin is."""
    origin = b.mean(-2, keepdim=True)
    a, b = a - origin, b - origin
    constant = linear.sum(-1, keepdim=True)
    return a.square() * w.sum(-1, keepdim=True) - 2 * a * (w @ b) + w @ b.square() + constant


@rule("RenormBackward0")
def renorm(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor:
    """y = s(n) x for slices of norm n above the largest allowed m, s = m/(n + 1e-7), with n' = ∂n/∂x, n'' = ∂²n/∂x²:

    h_x = s² h + 2 s s' x n' h + (s' n')² Σx²h + 2 s' n' g + (s'' n'² + s' n'') Σxg.
    """
    x, m = op.self, op.maxnorm
    dims = [i for i in range(x.dim()) if i != op.dim % x.dim()]
    n = torch.linalg.vector_norm(x, op.p, dims, keepdim=True)
    d1 = norm_slope(x, n, op.p)
    d2 = norm_bend(x, n, op.p, d1)
    s = m / (n + 1e-7)
    s1, s2 = -s.square() / m, 2 * s**3 / m**2
    wave, free = torch.zeros_like(x), torch.zeros_like(x)
    if h is not None:
        free = h
        wave = s * h * (s + 2 * s1 * x * d1) + (s1 * d1).square() * (x.square() * h).sum(dims, keepdim=True)
    if g is not None:
        bend = s2 * d1.square() if d2 is None else s2 * d1.square() + s1 * d2
        wave = wave + 2 * s1 * d1 * g + bend * (x * g).sum(dims, keepdim=True)
    return torch.where(n > m, wave, free)


@rule("CumprodBackward0")
def cumprod(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """yₖ = Πⱼ xⱼ, linear in each factor; J∘J is the Jacobian of cumprod at x²: h_x = J(x²)ᵀ h."""
    if h is None:
        return None
    x = op.self.to(h.dtype)
    return torch.ops.aten.cumprod_backward(h, x.square(), op.dim, op.result.square())


@rule("LogcumsumexpBackward0")
def logcumsumexp(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """yₖ = log Σⱼ exp xⱼ, Jₖⱼ = exp(xⱼ - yₖ):  h_x = (J∘J)ᵀ (h - g) + Jᵀg."""
    weight = h if g is None else -g if h is None else h - g
    if weight is None:
        return None
    signed = []
    for part in (weight.clamp_min(0), (-weight).clamp_min(0)):  # in logarithms, which do not overflow
        sums = (part.log() - 2 * op.result).flip(op.dim).logcumsumexp(op.dim).flip(op.dim)
        signed.append((2 * op.self + sums).exp())
    wave = signed[0] - signed[1]
    return wave if g is None else wave + op.vjp(g)[0]
