"""MINRES: symmetric systems, indefinite and singular ones included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from .solution import Solution, check, damped, preconditioned

Product = Callable[[Tensor], Tensor]


def minres(
    operator: Any,
    b: Tensor,
    *,
    damping: float = 0.0,
    preconditioner: Any = None,
    tolerance: float = 1e-6,
    steps: int | None = None,
    negative: str = "ignore",
) -> Solution:
    """The x of the Krylov space that makes ‖b - (A + δ I) x‖ smallest, A symmetric, whatever its signs.

    One product a step, eight vectors. For a singular A and a b outside its range the residual cannot vanish; then it
    ends with ``reason="least squares"`` and ``converged=False``, where Ar is nothing beside ‖A‖ ‖r‖.

    Args:
        operator: A, anything with ``.shape`` and ``@``.
        b: ``[P]``.
        damping: δ.
        preconditioner: M, symmetric positive definite: an operator, a matrix, or a diagonal ``[P]``. Residuals are then
            measured as (rᵀMr)^½.
        tolerance: of the residual relative to b's, and of ‖Ar‖ relative to ‖A‖ ‖r‖.
        steps: at most; 5 P if not given.
        negative: ``"ignore"``, or ``"stop"`` where d = Mr has κ = dᵀ(A + δ I)d / rᵀMr <= 0 (to rounding), r the
            residual, with the x before that, for which bᵀx > 0 and xᵀ(A + δ I)x > 0 (it is zero at the first step), and
            ``direction`` d / |κ|, |κ| being a hundredth of the norm of M(A + δ I) at least.

    Sources: C. Paige and M. Saunders, Solution of sparse indefinite systems of linear equations, 1975; Y. Liu and
    F. Roosta, A Newton-MR algorithm with complexity guarantees, 2022 (negative curvature).
    """
    if negative not in ("ignore", "stop"):
        raise CurvatureError(f"negative={negative!r}: give 'ignore' or 'stop'")
    b = check(operator, b)
    product, precondition = damped(operator, damping), preconditioned(preconditioner, b)
    y = precondition(b)
    first = phi = _length(b, y)
    x, r, w, w_before = (torch.zeros_like(b) for _ in range(4))
    cosine, sine, dbar, epsilon, size, beta = -1.0, 0.0, 0.0, 0.0, 0.0, 0.0
    residuals, reason = [first], "steps" if first else "tolerance"
    limit = 5 * len(b) if steps is None else steps
    for v, alpha, beta_next in islice(_lanczos(product, precondition, b, y), limit if first else 0):
        beta_before, beta = beta, beta_next
        r = sine**2 * r - phi * cosine * v  # M times the residual
        # two rotations make T triangular
        delta, gbar = cosine * dbar + sine * alpha, sine * dbar - cosine * alpha
        epsilon_before, epsilon, dbar = epsilon, sine * beta, -cosine * beta
        size = max(size, abs(alpha) + beta + beta_before)
        if negative == "stop" and -cosine * gbar <= torch.finfo(b.dtype).eps * size:
            reason = "negative curvature"
            break
        if math.hypot(gbar, dbar) <= tolerance * size:  # ‖A r‖ / ‖r‖ before this step
            reason = "least squares"
            break
        gamma = math.hypot(gbar, beta)
        cosine, sine = gbar / gamma, beta / gamma
        w_before, w = w, (v - epsilon_before * w_before - delta * w) / gamma
        x = x + cosine * phi * w
        phi *= sine
        residuals.append(phi)
        if phi <= tolerance * first or not math.isfinite(phi):
            reason = "tolerance" if math.isfinite(phi) else "not finite"
            break
    products = len(residuals) - 1 + (reason in ("least squares", "negative curvature"))
    direction = r / max(abs(cosine * gbar), 1e-2 * size) if reason == "negative curvature" else None
    residual = torch.tensor(residuals, dtype=b.dtype)
    return Solution(x, residual, reason == "tolerance", products, reason, direction=direction)


def _lanczos(product: Product, precondition: Product, b: Tensor, y: Tensor) -> Iterator[tuple[Tensor, float, float]]:
    """v, α and the next β of A v = β_before v_before + α v + β_next v_next, where v = y / β with y = M r."""
    before, now, beta_before, beta = torch.zeros_like(b), b, 1.0, _length(b, y)
    while True:
        v = y / beta
        z = product(v) - beta / beta_before * before
        alpha = float(v @ z)
        before, now = now, z - alpha / beta * now
        y = precondition(now)
        beta_before, beta = beta, _length(now, y)
        yield v, alpha, beta


def _length(r: Tensor, y: Tensor) -> float:
    square = float(r @ y)
    if square < 0:
        raise CurvatureError("minres: rᵀMr < 0, so the preconditioner is not positive definite")
    return math.sqrt(square)
