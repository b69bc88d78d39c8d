"""First-order quantities: every sample's gradient, and what is had from it without storing it.

With the loss a sum over samples, L = Σ_n ℓ_n, the gradient of sample n is g_n = ∂ℓ_n/∂p. A mean over samples is a sum
of ℓ_n that have the 1/N in them, and so do these quantities, as ``p.grad`` and as BackPACK's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..persample import PerSample
from ..wave import Wave
from .base import Quantity, Target
from .readings import BySample, formed
from .waves import SampleGradients, owned


@dataclass(frozen=True)
class _FirstOrder(Quantity):
    """A function of every sample's gradient of a parameter."""

    per_sample = True

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (SampleGradients(),)

    def read(self, target: Target, *arrived: Any) -> Any:
        gradients = owned(arrived[0], type(self).__name__)
        return None if gradients is None else self.of(gradients, target)

    def of(self, gradients: PerSample, target: Target) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class BatchGrad(BySample, _FirstOrder):
    """Every sample's gradient, ``[N, *P]``: ``grad_batch[n]`` = ∂ℓ_n/∂p, and their sum is ``p.grad``.

    Several backward passes in one block are joined along N.

    Args:
        subsampling: the samples to keep, by index; all by default.
    """

    subsampling: Sequence[int] | None = None
    savefield = "grad_batch"

    def of(self, gradients: PerSample, target: Target) -> Tensor:
        kept = self.kept(gradients)
        return formed(kept, target, kept.size[1:])


@dataclass(frozen=True)
class BatchL2Grad(_FirstOrder):
    """Squared norm of every sample's gradient of this parameter, ``[N]``; the gradients are not formed."""

    savefield = "batch_l2"

    def of(self, gradients: PerSample, target: Target) -> Tensor:
        return gradients.norms()[0]

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b])

    def zero(self, target: Target) -> Tensor:
        return target.tensor.new_zeros(target.n or 0)


@dataclass(frozen=True)
class SumGradSquared(_FirstOrder):
    """Σ_n g_n², entry by entry, ``P``: the diagonal of the empirical Fisher matrix, up to scaling."""

    savefield = "sum_grad_squared"

    def of(self, gradients: PerSample, target: Target) -> Tensor:
        return gradients.squares()


@dataclass(frozen=True)
class Variance(_FirstOrder):
    """Variance of the samples' gradients, entry by entry, ``P``: 1/N Σ_n g_n² - (1/N Σ_n g_n)²."""

    savefield = "variance"
    total = True

    def of(self, gradients: PerSample, target: Target) -> tuple[int, Tensor, Tensor, int]:
        total = target.gradient
        if total is None or total.layout is not torch.strided:
            total = gradients.sums()[0]
        return gradients.size[1], total, gradients.squares(), total._version

    def settled(self, held: Any) -> Any:
        n, total, squares, version = held
        if total._version != version:
            raise CurvatureError(
                "Variance: gradients were changed in place between two backward passes of one block; call "
                "zero_grad(), clip or step outside the block"
            )
        total = total.clone()  # the next pass adds to it
        return n, total, squares, total._version

    def add(self, a: Any, b: Any) -> Any:
        total = a[1] + b[1]
        return a[0] + b[0], total, a[2] + b[2], total._version

    def zero(self, target: Target) -> Any:
        none = torch.zeros_like(target.tensor, requires_grad=False)
        return target.n or 1, none, none, none._version

    def result(self, held: Any, target: Target) -> Tensor:
        n, total, squares, _ = held
        return torch.addcmul(squares, total, total, value=-1 / n).div_(n)


@dataclass(frozen=True)
class BatchDotGrad(_FirstOrder):
    """Inner products of the samples' gradients of this parameter, ``[N, N]``; of one backward pass."""

    savefield = "batch_dot"

    def of(self, gradients: PerSample, target: Target) -> Tensor:
        return gradients.gram()[0, :, 0]

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        raise CurvatureError("BatchDotGrad: products between the samples of two backward passes are not kept; use one")

    def zero(self, target: Target) -> Tensor:
        return target.tensor.new_zeros(target.n or 0, target.n or 0)
