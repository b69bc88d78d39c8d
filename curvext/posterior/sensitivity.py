"""How a minimum answers to its data: influence, leaving samples out, hyper-parameters, standard deviations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..hierarchical.factor import Factorization
from ..hierarchical.hodlr import HierarchicalOperator
from ..solvers import cg


class Sensitivity:
    """Derivatives of θ* = argmin L(θ) + ½ δ ‖θ‖², L = (1/N) Σᵢ ℓᵢ, by the implicit function theorem.

    With A the Hessian (or Gauss-Newton matrix) of L at θ*: dθ*/dz = -(A + δI)⁻¹ ∂²L/∂θ∂z. Solves are by conjugate
    gradients on the exact operator, with the approximation as preconditioner. The approximation's own inverse is taken
    only where it is known to be good: ‖A - Â‖ < δ.

    Koh & Liang 2017; Beirami et al. 2017.

    Args:
        operator: A, anything with ``.shape`` and ``@``, positive semi-definite.
        damping: δ > 0, the penalty's weight.
        approximation: Â, a :class:`~curvext.operators.HierarchicalOperator` of A.
        tolerance: of the solves, relative.
    """

    def __init__(
        self,
        operator: Any,
        damping: float,
        approximation: HierarchicalOperator | None = None,
        tolerance: float = 1e-8,
    ):
        if not 0 < damping < math.inf:
            raise ValueError(f"Sensitivity: damping={damping} must be positive")
        self.operator, self.damping, self.tolerance, self.approximation = operator, damping, tolerance, approximation
        self.factor: Factorization | None = None if approximation is None else approximation.factor(damping, True)

    def solve(self, b: Tensor) -> Tensor:
        """(A + δI)⁻¹ b, ``[P]`` or ``[P, K]``, to ``tolerance``."""
        found = cg(self.operator, b, damping=self.damping, preconditioner=self.factor, tolerance=self.tolerance)
        if not found.converged:
            raise CurvatureError(f"Sensitivity: conjugate gradients ended by {found.reason}; A + δI has to be positive")
        return found.x

    def influence(self, gradients: Tensor, samples: Tensor) -> Tensor:
        """What leaving out a sample does to other functions, to first order: gₜᵀ (A + δI)⁻¹ gᵢ / N, ``[T, N]``.

        Args:
            gradients: of T functions of θ at θ*, such as losses of test samples, ``[P, T]``.
            samples: ∂ℓᵢ/∂θ of the N training samples, ``[P, N]``.
        """
        if gradients.dim() != 2 or samples.dim() != 2:
            raise ValueError(
                f"influence: {tuple(gradients.shape)} and {tuple(samples.shape)} are not [P, T] and [P, N]"
            )
        few, many = (gradients, samples) if gradients.shape[1] <= samples.shape[1] else (samples, gradients)
        product = self.solve(few).mT @ many / samples.shape[1]
        return product if few is gradients else product.mT

    def leave_one_out(self, jacobians: Tensor, slopes: Tensor, hessians: Tensor) -> Tensor:
        """The change of every sample's own output when it is left out, ``[N, C]``.

            Δzᵢ = Sᵢ (I - Bᵢ Sᵢ / N)⁻¹ sᵢ / N,   Sᵢ = Jᵢ (A + δI)⁻¹ Jᵢᵀ

        one Newton step without the sample, exact for quadratic losses of a linear model. Takes N C solves.

        Args:
            jacobians: Jᵢᵀ, ``[P, N, C]``.
            slopes: sᵢ = ∂ℓᵢ/∂zᵢ, ``[N, C]``.
            hessians: Bᵢ = ∂²ℓᵢ/∂zᵢ², ``[N, C, C]``.
        """
        p, n, c = jacobians.shape
        solved = self.solve(jacobians.reshape(p, n * c)).view(p, n, c)
        spread = torch.einsum("pnc,pnd->ncd", jacobians, solved) / n
        inner = torch.eye(c, dtype=spread.dtype, device=spread.device) - hessians @ spread
        return (spread @ torch.linalg.solve(inner, slopes.unsqueeze(-1))).squeeze(-1)

    def hyperparameter(self, mixed: Tensor) -> Tensor:
        """dθ*/dα = -(A + δI)⁻¹ ∂²L/∂θ∂α, ``[P, K]`` for K hyper-parameters (θ* itself for α = δ)."""
        return -self.solve(mixed)

    def predictive_variance(self, jacobian: Tensor) -> Tensor:
        """jᵀ (A + δI)⁻¹ j of every column of ``jacobian [P, K]``."""
        return (jacobian * self.solve(jacobian)).sum(0)

    def standard_deviations(self) -> Tensor:
        """√ diag (A + δI)⁻¹, ``[P]``, from the approximation where it is good enough."""
        return self.direct().diagonal().sqrt()

    def effective_dimension(self) -> Tensor:
        """tr A (A + δI)⁻¹ from the approximation where it is good enough."""
        return self.direct().effective_dimension()

    def direct(self) -> Factorization:
        """(Â + δI)⁻¹; refused where ‖A - Â‖, as probes saw it in Frobenius norm, is not below δ."""
        h = self.approximation
        if h is None or self.factor is None:
            raise CurvatureError("Sensitivity: this needs an approximation: HierarchicalOperator.from_operator(A, ...)")
        if h.error is None or h.scale is None:
            raise CurvatureError(
                "Sensitivity: the approximation's error is not known; refreshed(A, tolerance) measures it"
            )
        missing = h.error * h.scale
        if not missing < self.damping or self.factor.added:
            raise CurvatureError(
                f"Sensitivity: the approximation's error ({missing:.1e}, {self.factor.added:.1e} added) is not below "
                f"damping={self.damping}, so its inverse says little. Build it to a smaller tolerance, or ask for "
                "single entries by solve, which is exact"
            )
        return self.factor
