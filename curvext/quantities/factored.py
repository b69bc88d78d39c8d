"""The factor of the Gauss-Newton matrix as it arrives, for operators that need all parameters together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..factor import Diagonal, Whole, at_target
from ..persample import Dense, PerSample
from ..wave import Wave
from .base import Quantity, Target, positive
from .waves import Factor


@dataclass(frozen=True, eq=False)
class Columns:
    """Rows of S with G = S Sᵀ that belong to one tensor, kept as what arrived.

    Args:
        like: an empty tensor of the dtype and device.
        shape: of the tensor.
        parts: by source; columns of one source belong together in all tensors. A :class:`Diagonal` is a block of its
            own.
    """

    like: Tensor
    shape: torch.Size
    parts: Mapping[object, PerSample | Diagonal]

    def __add__(self, other: Columns) -> Columns:
        return replace(self, parts={**self.parts, **other.parts})


@dataclass(frozen=True)
class GGNFactor(Quantity):
    """What :class:`~curvext.operators.FactoredGaussNewton` is made of: the columns JᵀS of all parameters, not formed.

    At the weight of a linear map they are kept as its inputs x and the waves s, N (I + V·O) numbers a position.
    Several backward passes in one block add up.

    Args:
        mc_samples: random columns a sample, whose expectation gives G; ``None`` for all.
    """

    mc_samples: int | None = None
    savefield = "ggn_factor"

    def __post_init__(self) -> None:
        positive(self, mc_samples=self.mc_samples)

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (Factor("fewest") if self.mc_samples is None else Factor("draws", self.mc_samples),)

    def read(self, target: Target, *waves: Any) -> Columns:
        values = {source: at_target(value, target.axis, target.n) for source, value in (waves[0] or {}).items()}
        return replace(self.zero(target), parts={source.token: _kept(value) for source, value in values.items()})

    def join(self, a: Columns, b: Columns) -> Columns:
        return a + b

    def zero(self, target: Target) -> Columns:
        return Columns(target.tensor.detach().new_empty(0), target.tensor.shape, {})


def _kept(value: Any) -> Any:
    """Columns without the graph of what they were computed from; those that no sample owns as of one sample."""
    value = Dense(value.columns.unsqueeze(1)) if isinstance(value, Whole) else value
    tensors = {f.name: t.detach() for f in fields(value) if isinstance(t := getattr(value, f.name), Tensor)}
    return replace(value, **tensors)
