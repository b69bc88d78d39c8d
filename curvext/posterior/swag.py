"""SWAG: a Gaussian around the mean of the weights that training passes through."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..operators import Diagonal, LowRank
from ..operators.base import Operator


class SWAG:
    """N(θ̄, ½ (Σ + D Dᵀ / (K - 1))), from the weights θ that training passes through.

        swag = SWAG()
        for epoch in range(epochs):
            train(model)
            swag.collect(model.parameters())
        for θ in swag.draw(30).T:
            torch.nn.utils.vector_to_parameters(θ, model.parameters())

    θ̄ is the mean of all that were collected, Σ the diagonal of their variances; the K columns of D are θ - θ̄ of the
    last ones, each with the mean that it was the last to enter. ``rank=0`` is SWAG-diagonal, N(θ̄, Σ). Averages of batch
    normalisation are to be brought up to date for θ̄ and for every draw (``torch.optim.swa_utils.update_bn``).

    Args:
        rank: the greatest K.

    Attributes:
        count: how many were collected.
        mean: θ̄ ``[P]``.
        deviations: the columns of D, oldest first.

    Source: Maddox et al. 2019, https://arxiv.org/abs/1902.02476. The released code divides by the greatest K while
    there are fewer columns.
    """

    def __init__(self, rank: int = 20):
        if rank < 0 or rank == 1:
            raise ValueError(f"SWAG: rank={rank} must be 0, or 2 and more")
        self.rank, self.count = rank, 0
        self.mean = self._squares = torch.zeros(())
        self.deviations: deque[Tensor] = deque(maxlen=rank)

    def collect(self, parameters: Iterable[Tensor]) -> None:
        """Take in the weights as they are now."""
        θ = torch.cat([p.detach().flatten() for p in parameters])
        if self.count and θ.shape != self.mean.shape:
            raise ValueError(f"SWAG: {len(θ)} weights, and {len(self.mean)} before")
        self.count += 1
        before = θ - self.mean
        self.mean = self.mean + before / self.count
        self.deviations.append(θ - self.mean)
        self._squares = self._squares + before * (θ - self.mean)

    @property
    def variance(self) -> Tensor:
        """Σ's diagonal ``[P]``."""
        if self.count < 2:
            raise CurvatureError(f"SWAG: a variance takes weights from two times or more, not {self.count}")
        return self._squares / self.count

    @property
    def covariance(self) -> Operator:
        """As an operator ``[P, P]``."""
        diagonal = Diagonal(self.variance)
        return (diagonal + LowRank(self._factor())) * 0.5 if self.rank else diagonal

    def draw(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """Columns ``[P, n]``."""
        z = _normal(self.variance, n, generator)
        x = self.variance.sqrt().unsqueeze(1) * z
        if self.rank:
            D = self._factor()
            x = (x + D @ _normal(D[0], n, generator)) * 0.5**0.5
        return self.mean.unsqueeze(1) + x

    def _factor(self) -> Tensor:
        """D / √(K - 1)."""
        return torch.stack([*self.deviations], 1) / (len(self.deviations) - 1) ** 0.5


def _normal(like: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Columns ``[len(like), n]``."""
    return torch.randn(len(like), n, generator=generator, dtype=like.dtype, device=like.device)
