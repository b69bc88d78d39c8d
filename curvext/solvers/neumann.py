"""The Neumann series of an inverse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from .solution import Solution, check, damped, norm, preconditioned


def neumann(
    operator: Any,
    b: Tensor,
    *,
    scale: float = 1.0,
    damping: float = 0.0,
    preconditioner: Any = None,
    tolerance: float = 0.0,
    steps: int = 100,
) -> Solution:
    """Terms of  x = s Σₘ (I - s M (A + δ I))ᵐ M b,  m = 0, 1, ..., ``steps`` - 1.

    One product a term after the first. Converges where every eigenvalue of s M (A + δ I) lies in (0, 2), so for M = I
    with s < 2 / λ_max and positive definite A + δ I; otherwise it ends with ``reason="diverged"`` once the residual has
    grown tenfold. A fixed number of terms is a fixed linear function of b: that is what it is good for, CG being
    faster.

    Args:
        operator: A, anything with ``.shape`` and ``@``.
        b: ``[P]`` or ``[P, K]``.
        scale: s.
        damping: δ.
        preconditioner: M: an operator, a matrix, or a diagonal ``[P]``.
        tolerance: ends with ‖b - (A + δ I) x‖ <= tolerance ‖b‖ for every column; ``converged`` tells whether it did.
        steps: terms at most.
    """
    b = check(operator, b, columns=True)
    if steps < 1:
        raise CurvatureError("neumann: at least one term")
    product, precondition = damped(operator, damping), preconditioned(preconditioner, b)
    first, residuals, x, r = norm(b), [norm(b)], torch.zeros_like(b), b
    reason = "steps"
    for term in range(steps):
        if term:
            r = b - product(x)
            residuals.append(norm(r))
        reason = _reason(residuals[-1], first, tolerance)
        if reason != "steps":
            break
        x = x + scale * precondition(r)
    columns = b.shape[1] if b.dim() == 2 else 1
    products = (len(residuals) - 1) * columns
    return Solution(x, torch.stack(residuals), reason == "tolerance", products, reason)


def _reason(residual: Tensor, first: Tensor, tolerance: float) -> str:
    if bool((residual <= tolerance * first).all()):
        return "tolerance"
    return "steps" if bool((residual <= 10 * first).all()) else "diverged"
