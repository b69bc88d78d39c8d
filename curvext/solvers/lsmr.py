"""LSMR: least squares with a rectangular operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .solution import Solution, check, times


def lsmr(
    operator: Any, b: Tensor, *, damping: float = 0.0, tolerance: float = 1e-6, steps: int | None = None
) -> Solution:
    """The x with the smallest ‖Ax - b‖² + δ² ‖x‖²; of several, the shortest. A is ``[m, n]``, b ``[m]``.

    A product with A and one with ``A.T`` a step, six vectors. Ends where ‖r‖ <= ``tolerance`` ‖b‖ (a solution), or
    ‖Aᵀr‖ <= ``tolerance`` ‖A‖ ‖r‖ (least squares), r and A including the damping's rows. Unlike CG on AᵀA + δ², the
    residuals never grow: ``residuals`` holds ‖Aᵀr‖.

    Args:
        operator: A, anything with ``.shape``, ``@`` and ``.T``.
        b: ``[m]``.
        damping: δ, by its square: the normal equations are (AᵀA + δ² I) x = Aᵀb.
        tolerance: see above.
        steps: at most; 4 max(m, n) if not given.

    Source: D. Fong and M. Saunders, LSMR: an iterative algorithm for sparse least-squares problems, 2011.
    """
    b = check(operator, b, square=False)
    adjoint = operator.T
    u, beta = _unit(b)
    v, alpha = _unit(times(adjoint, u))
    run = _Rotations(v, alpha, beta, damping)
    reason, limit = run.reason(tolerance), 4 * max(operator.shape) if steps is None else steps
    while not reason and len(run.residuals) <= limit:
        u, beta = _unit(times(operator, v) - alpha * u)
        v, alpha = _unit(times(adjoint, u) - beta * v)
        run.advance(v, alpha, beta)
        reason = run.reason(tolerance)
    products = 2 * len(run.residuals) - 1
    converged = reason in ("tolerance", "least squares")
    return Solution(run.x, torch.tensor(run.residuals, dtype=b.dtype), converged, products, reason or "steps")


class _Rotations:
    """The two QR factorisations of LSMR, in the paper's letters, and what they update."""

    def __init__(self, v: Tensor, alpha: float, beta: float, damping: float):
        self.damping, self.b = damping, beta
        self.x, self.h, self.hbar = torch.zeros_like(v), v, torch.zeros_like(v)
        self.alphabar, self.zetabar, self.rho, self.rhobar = alpha, alpha * beta, 1.0, 1.0
        self.cbar, self.sbar = 1.0, 0.0
        self.betadd, self.betad, self.rhodold, self.tautildeold = beta, 0.0, 1.0, 0.0
        self.thetatilde, self.zeta, self.rest = 0.0, 0.0, 0.0
        self.residual, self.size = beta, alpha**2
        self.residuals = [abs(self.zetabar)]

    def advance(self, v: Tensor, alpha: float, beta: float) -> None:
        chat, shat, alphahat = _rotation(self.alphabar, self.damping)
        rho_before = self.rho
        c, s, self.rho = _rotation(alphahat, beta)
        theta, self.alphabar = s * alpha, c * alpha
        rhobar_before, zeta_before = self.rhobar, self.zeta
        thetabar, rhotemp = self.sbar * self.rho, self.cbar * self.rho
        self.cbar, self.sbar, self.rhobar = _rotation(rhotemp, theta)
        self.zeta, self.zetabar = self.cbar * self.zetabar, -self.sbar * self.zetabar
        self.hbar = self.h - thetabar * self.rho / (rho_before * rhobar_before) * self.hbar
        self.x = self.x + self.zeta / (self.rho * self.rhobar) * self.hbar
        self.h = v - theta / self.rho * self.h
        self._estimate(chat, shat, c, s, thetabar, rhobar_before, zeta_before)
        self.size += alpha**2 + beta**2
        self.residuals.append(abs(self.zetabar))

    def _estimate(
        self, chat: float, shat: float, c: float, s: float, thetabar: float, rhobar: float, zeta: float
    ) -> None:
        """‖r‖, section 5.1 of the paper."""
        betaacute, betacheck = chat * self.betadd, -shat * self.betadd
        betahat, self.betadd = c * betaacute, -s * betaacute
        thetatilde_before = self.thetatilde
        ctilde, stilde, rhotilde = _rotation(self.rhodold, thetabar)
        self.thetatilde, self.rhodold = stilde * self.rhobar, ctilde * self.rhobar
        self.betad = -stilde * self.betad + ctilde * betahat
        self.tautildeold = (zeta - thetatilde_before * self.tautildeold) / rhotilde
        taud = (self.zeta - self.thetatilde * self.tautildeold) / self.rhodold
        self.rest += betacheck**2
        self.residual = math.sqrt(self.rest + (self.betad - taud) ** 2 + self.betadd**2)

    def reason(self, tolerance: float) -> str:
        normal = self.residuals[-1]
        if self.b == 0 or self.residual <= tolerance * self.b:
            return "tolerance"
        if normal <= tolerance * math.sqrt(self.size + self.damping**2) * self.residual:
            return "least squares"
        return "" if math.isfinite(normal) else "not finite"


def _rotation(a: float, b: float) -> tuple[float, float, float]:
    r = math.hypot(a, b)
    return (a / r, b / r, r) if r else (1.0, 0.0, 0.0)


def _unit(v: Tensor) -> tuple[Tensor, float]:
    length = float(torch.linalg.vector_norm(v))
    return (v / length if length else v), length
