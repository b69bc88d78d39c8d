"""A Gaussian around a minimum, as narrow as the curvature says along its largest eigenvectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..operators import Identity, LowRank
from ..operators.base import Operator


class HessTrucks:
    """N(θ̄, (Ĥ + a I)⁻¹), Ĥ = V diag(h) Vᵀ from the largest eigenpairs of the summed loss's curvature at θ̄.

        pairs = spectra.eigenpairs(curvature, 20)  # of a mean over N samples
        posterior = HessTrucks(swag.mean, N * pairs.values, pairs.vectors, precision=N * weight_decay)

    Outside of V's space it is the prior, N(θ̄, I / a). Nothing of the size of the whole matrix is formed. Eigenvalues
    below zero count as zero: θ̄ is no minimum along these.

    Args:
        mean: θ̄ ``[P]``, such as that of :class:`SWAG`.
        values, vectors: h ``[k]`` and orthonormal columns V ``[P, k]``.
        precision: a.

    Our reading of "SWA-Hess-Trucks" by Salkey, Benton & Maddox 2019, which leaves the formula open.
    """

    def __init__(self, mean: Tensor, values: Tensor, vectors: Tensor, precision: float):
        if not 0 < precision < math.inf:
            raise ValueError(f"HessTrucks: precision={precision} must be positive")
        if vectors.shape != (len(mean), len(values)):
            raise ValueError(
                f"HessTrucks: vectors {tuple(vectors.shape)} for {len(mean)} weights and {len(values)} values"
            )
        off = vectors.mT @ vectors - torch.eye(len(values), dtype=vectors.dtype, device=vectors.device)
        if not bool((off.abs() < 1e-3).all()):
            raise ValueError("HessTrucks: vectors must be orthonormal columns")
        self.mean, self.values, self.vectors, self.precision = mean, values.clamp(min=0), vectors, precision

    @property
    def covariance(self) -> Operator:
        """(I - V diag(h / (h + a)) Vᵀ) / a, as an operator ``[P, P]``."""
        unit = Identity(len(self.mean), self.mean.dtype, self.mean.device)
        return (unit - LowRank(self.vectors, self._known)) / self.precision

    def draw(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Columns ``[P, n]``."""
        like = self.mean
        z = torch.randn(len(like), n, generator=generator, dtype=like.dtype, device=like.device)
        less = 1 - (1 - self._known).sqrt()
        z = z - self.vectors @ (less.unsqueeze(1) * (self.vectors.mT @ z))
        return self.mean.unsqueeze(1) + z / math.sqrt(self.precision)

    def log_determinant(self) -> Tensor:
        """Of the covariance: -P log a - Σ log(1 + h / a)."""
        return -len(self.mean) * math.log(self.precision) - (self.values / self.precision).log1p().sum()

    def effective_dimension(self) -> Tensor:
        """Σ h / (h + a)."""
        return self._known.sum()

    @property
    def _known(self) -> Tensor:
        """h / (h + a): how much of what is known along each vector the data have said."""
        return self.values / (self.values + self.precision)
