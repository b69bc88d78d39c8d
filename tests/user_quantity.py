"""Two quantities as a user writes them, from docs/quantities.md alone."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvext import CurvatureError
from curvext.quantities import Factor, Quantity, SampleGradients, arrived, owned


@dataclass(frozen=True)
class Alignment(Quantity):
    """Cosine of every sample's gradient with the mean gradient, ``[N]``: ⟨gₙ, Σ g⟩ / (|gₙ| |Σ g|)."""

    savefield = "alignment"
    per_sample = True

    @property
    def waves(self) -> tuple[Any, ...]:
        return (SampleGradients(),)

    def read(self, target: Any, gradients: Any) -> Any:
        gradients = owned(gradients, "Alignment")
        if gradients is None:
            return None
        products = gradients.gram()[0, :, 0].sum(1)
        return products / (gradients.norms()[0] * products.sum()).sqrt()

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        raise CurvatureError("Alignment: the mean gradient is that of one backward pass; use one in a block")

    def zero(self, target: Any) -> Tensor:
        return target.tensor.new_zeros(target.n or 0)


@dataclass(frozen=True)
class SampleTrace(Quantity):
    """Trace of every sample's part of the parameter's Gauss-Newton block, ``[N]``."""

    savefield = "sample_trace"
    per_sample = True

    @property
    def waves(self) -> tuple[Any, ...]:
        return (Factor("fewest"),)

    def read(self, target: Any, columns: Any) -> Any:
        samples = arrived(columns, target).owned("SampleTrace")
        return None if samples is None else samples.norms().sum(0)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b])

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def zero(self, target: Any) -> Tensor:
        return target.tensor.new_zeros(target.n or 0)
