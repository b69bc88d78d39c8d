"""Diagonal curvature in one backward pass: HesScale, its Gauss-Newton form, and Becker and LeCun's rule of 1989."""

from __future__ import annotations

from dataclasses import dataclass

from ..diagonal import Waves, bends, pass_diagonal
from ..graph import Operation
from .base import Carried


@dataclass(frozen=True)
class HesScale(Carried):
    """Hessian diagonal of the loss, estimated by a backward recursion that keeps only diagonals.

        h_x = (J∘J)ᵀ h_y + diag(Σₖ gₖ ∂²yₖ/∂x²)        operation by operation, from h = 0 at the loss

    The result has the parameter's shape and the loss's scaling (the reduction's 1/N is in it, as in ``p.grad``).
    Each step is exact when the curvature at its output is diagonal; softmax cross entropy is exact at the last layer.
    The only error is the off-diagonal part dropped between layers, at shared weights, and where branches meet.

    Args:
        gauss_newton: leave out the second term of everything below the loss, that is below the topmost nonlinear
            operation (HesScaleGN): a diagonal recursion for the Gauss-Newton matrix, never negative for a
            convex loss. Saved as ``hesscale_gn``.

    Source: Elsayed & Mahmood 2022, https://arxiv.org/abs/2210.11639; Elsayed et al. 2024,
    https://arxiv.org/abs/2406.03276.
    """

    gauss_newton: bool = False

    @property
    def savefield(self) -> str:  # type: ignore[override]
        return "hesscale_gn" if self.gauss_newton else "hesscale"

    def needs_gradient(self, op: Operation) -> bool:
        return bends(op)

    def step(self, op: Operation, g: Waves, wave: Waves) -> Waves:
        below_loss = any(h is not None for h in wave)
        return pass_diagonal(op, None if self.gauss_newton and below_loss else g, wave)


@dataclass(frozen=True)
class BL89(Carried):
    """The diagonal recursion of Becker & LeCun (1989): softmax counts as an elementwise function.

    The same recursion as :class:`HesScale` except at softmax and log-softmax, where only the true class keeps
    curvature: ``h_i = 1[i = y] q_i (1 - q_i)`` against HesScale's ``q_i - q_i²``. Shape and scaling as for HesScale.

    Source: Becker & LeCun, Improving the convergence of back-propagation learning with second order methods, 1989.
    """

    savefield = "bl89"

    def needs_gradient(self, op: Operation) -> bool:
        return bends(op)

    def step(self, op: Operation, g: Waves, wave: Waves) -> Waves:
        return pass_diagonal(op, g, wave, "bl89")
