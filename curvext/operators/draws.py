"""Random factors of the loss Hessian at the model's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..extend import extend
from ..quantities.base import Quantity, Target
from ..quantities.waves import Factor
from ..wave import Wave


@dataclass(frozen=True)
class _Root(Quantity):
    """Random columns ``[V, *z.shape]`` whose outer products are the loss Hessian on average, sample by sample."""

    draws: int
    savefield = "loss_root"

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (Factor("draws", self.draws),)

    def read(self, target: Target, *arrived: Any) -> Tensor:
        columns = list((arrived[0] or {}).values())
        if not columns or not all(isinstance(c, Tensor) for c in columns):
            raise CurvatureError("Fisher: the loss has no curvature in the model's outputs that belongs to samples")
        return torch.cat(columns)


def loss_draws(loss: Callable[[Tensor], Tensor], z: Tensor, draws: int, seed: int) -> Tensor:
    """``[V, *z.shape]`` with E Σᵥ Sᵥ Sᵥᵀ = B_n for every sample n; the same for the same seed."""
    leaf = z.detach().requires_grad_()
    generator = torch.Generator(z.device).manual_seed(seed)
    with torch.enable_grad(), extend({"outputs": leaf}, _Root(draws), samples=len(z), generator=generator) as curvature:
        loss(leaf).backward()
    return curvature["loss_root"]["outputs"]
