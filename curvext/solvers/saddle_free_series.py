"""The saddle-free Newton step (|A| + δ I)⁻¹ b by a series of products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from .solution import Solution, check, norm, times


@dataclass(frozen=True)
class SeriesSolution(Solution):
    """A partial sum, accelerated or not, and the scale to hand to the next call.

    Attributes:
        scale: V, or the largest ‖A²v‖ / ‖v‖ met if the terms grew (``reason="diverged"``): the next call is wiser.
    """

    scale: float = math.nan


def saddle_free_series(
    operator: Any,
    b: Tensor,
    *,
    damping: float,
    terms: int = 20,
    order: int = 1,
    scale: float = 100.0,
    adapt: bool = True,
    decay: float = 1.0,
    tolerance: float = 0.1,
) -> SeriesSolution:
    """(|A| + δ I)⁻¹ b = V^-½ Σₘ cₘ (I - A² / V)ᵐ b, its first ``terms`` terms: 2 (``terms`` - 1) products.

    Converges where h² < 2 V for every eigenvalue h; directions with |h| < (V / terms)^½ are hardly resolved, which is
    the limit of the method: prefer :func:`saddle_free`.

    Args:
        operator: A, symmetric, anything with ``.shape`` and ``@``.
        b: ``[P]``.
        damping: δ >= 0; with zero the series diverges on the null space.
        terms: of the series.
        order: of Shanks's transformation, by Wynn's vector ε-algorithm on the last 2 ``order`` + 1 partial sums; zero
            for none.
        scale: V, or the one of the call before (``solution.scale``).
        adapt: raise V to ‖A²b‖ / ‖b‖, a lower bound of ‖A‖² that costs nothing.
        decay: V shrinks by this factor first, so that one early spike does not keep all later steps small.
        tolerance: ``converged`` tells whether the terms left out are below ``tolerance`` of the sum in every direction,
            whatever its eigenvalue: 1 - δ / V^½ Σ cₘ, which is what is missing for h = 0.

    Returns:
        ``residuals`` are norms of the terms.

    Source: E. Oldewage, R. Clarke, J. M. Hernández-Lobato, Series of Hessian-vector products for tractable saddle-free
    Newton optimisation of neural networks, 2023. The coefficients are computed so that they are right for every δ.
    """
    b = check(operator, b)
    if terms < 2 * order + 1 or damping < 0:
        raise CurvatureError(f"terms={terms} of order={order} with damping={damping}: terms > 2 order and damping >= 0")
    if not bool(b.any()):
        return SeriesSolution(b, norm(b)[None], True, 0, "tolerance", scale=scale)
    square, V = None, scale * decay if adapt else scale
    if terms > 1:
        square = times(operator, times(operator, b))
        V = max(V, float(norm(square) / norm(b))) if adapt else V
    weights = [c / math.sqrt(V) for c in coefficients(damping / math.sqrt(V), terms)]
    v, sums, sizes, ratios = b, [weights[0] * b], [weights[0] * norm(b)], []
    for weight in weights[1:]:
        square = times(operator, times(operator, v)) if square is None else square
        ratios.append(norm(square) / norm(v))
        v, square = v - square / V, None
        sums = [*sums[-2 * order :], sums[-1] + weight * v] if order else [sums[-1] + weight * v]
        sizes.append(abs(weight) * norm(v))
    x = shanks(sums)
    reason = "tolerance" if 1 - damping * sum(weights) <= tolerance else "terms"
    if not bool(sizes[-1] <= 2 * sizes[0]):
        reason, V = "diverged", max(V, float(torch.stack(ratios).max()))
    return SeriesSolution(x, torch.stack(sizes), reason == "tolerance", 2 * (terms - 1), reason, scale=V)


def coefficients(delta: float, terms: int) -> list[float]:
    """c₀, ..., of  1 / ((1 - x)^½ + δ) = Σₘ cₘ xᵐ,  each to a few roundings, for every δ >= 0.

    c₀ = 1 / (1 + δ) and cₘ₋₁ = (1 - δ²) cₘ + bₘ with bₘ = |binom(½, m)|. Upwards this multiplies rounding errors by 1 /
    |1 - δ²| a step (for 0 < δ < √2), downwards by |1 - δ²|; so downwards where it matters, from far enough above.
    """
    factor = 1 - delta**2
    if abs(factor) ** terms > 1e-2:
        c = [1 / (1 + delta)]
        for b in _binomials(terms - 1):
            c.append((c[-1] - b) / factor)
        return c
    above = terms + 2 + (math.ceil(-40 / math.log(abs(factor))) if factor else 0)
    c = [0.0]
    for b in reversed(_binomials(above)):
        c.append(factor * c[-1] + b)
    return c[::-1][:terms]


def _binomials(count: int) -> list[float]:
    """|binom(½, m)| for m = 1, ..., ``count``."""
    b = [0.5]
    for m in range(2, count + 1):
        b.append(b[-1] * (2 * m - 3) / (2 * m))
    return b[:count]


def shanks(sums: Sequence[Tensor]) -> Tensor:
    """The limit of 2 k + 1 partial sums by Wynn's vector ε-algorithm with Samelson's inverse w / wᵀw.

    Exact where the error is a sum of k geometric sequences. Where two neighbours agree there is nothing to extrapolate:
    the last sum is returned, as it is where the result is not finite.
    """
    before, now = [torch.zeros_like(sums[0])] * (len(sums) + 1), list(sums)
    for _ in range(len(sums) - 1):
        steps = [b - a for a, b in pairwise(now)]
        squares = [torch.dot(w, w) for w in steps]
        before, now = now, [e + w / w2 for e, w, w2 in zip(before[1:-1], steps, squares, strict=True)]
    return torch.where(now[0].isfinite().all(), now[0], sums[-1])
