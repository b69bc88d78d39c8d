"""Gauss-Newton quantities, G = Jᵀ B J: readings of the factor wave at every parameter.

B is the Hessian of the loss at its topmost nonlinear operation (:mod:`curvext.sources`), with the reduction's 1/N in
it, so G has the loss's scaling. ``Exact``: from a factor of B. ``MC``: from ``mc_samples`` random ones, E = G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..persample import Dense
from ..wave import Wave
from .base import Quantity, Target, positive
from .readings import Arrived, BySample, ColumnsBySample, arrived, squared, squared_by_sample
from .waves import Factor


@dataclass(frozen=True)
class _FactorReading(Quantity):
    """A sum over the columns of the factor wave."""

    def read(self, target: Target, *waves: Any) -> Tensor | None:
        terms = self.terms(arrived(waves[0], target), target)
        return sum(terms[1:], start=terms[0]) if terms else None

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def terms(self, found: Arrived, target: Target) -> list[Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class _Exact:
    @property
    def waves(self) -> tuple[Wave, ...]:
        return (Factor("fewest"),)


@dataclass(frozen=True)
class _MonteCarlo:
    mc_samples: int = 1

    def __post_init__(self) -> None:
        positive(self, mc_samples=self.mc_samples)

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (Factor("draws", self.mc_samples),)


class _Diagonal(_FactorReading):
    def terms(self, found: Arrived, target: Target) -> list[Tensor]:
        return [squared(value) for value in (*found.samples, *found.whole, *found.diagonal)]


@dataclass(frozen=True)
class DiagGGNExact(_Exact, _Diagonal):
    """Diagonal of the Gauss-Newton matrix, ``P``: Σ_n Σᵥ (J_nᵀ S_nv)²."""

    savefield = "diag_ggn_exact"


@dataclass(frozen=True)
class DiagGGNMC(_MonteCarlo, _Diagonal):
    """The same by ``mc_samples`` random columns a sample, ``P``; its expectation is the exact one."""

    savefield = "diag_ggn_mc"


class _BatchDiagonal(BySample, _FactorReading):
    def terms(self, found: Arrived, target: Target) -> list[Tensor]:
        return [squared_by_sample(columns, target) for columns in found.parts(type(self).__name__)]


@dataclass(frozen=True)
class BatchDiagGGNExact(_Exact, _BatchDiagonal):
    """Every sample's part of the diagonal, ``[N, *P]``; their sum is that of :class:`DiagGGNExact`."""

    savefield = "diag_ggn_exact_batch"


@dataclass(frozen=True)
class BatchDiagGGNMC(_MonteCarlo, _BatchDiagonal):
    """Every sample's part of :class:`DiagGGNMC`, ``[N, *P]``."""

    savefield = "diag_ggn_mc_batch"


@dataclass(frozen=True)
class SqrtGGNExact(ColumnsBySample):
    """Columns J_nᵀ S_nv of the symmetric factor of B, ``[C, N, *P]``: Σ_c Σ_n of outer products is G.

    C counts all outputs of a sample: classes times positions.

    Args:
        subsampling: the samples to keep, by index; all by default.
    """

    subsampling: Sequence[int] | None = None
    savefield = "sqrt_ggn_exact"

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (Factor("columns"),)


@dataclass(frozen=True)
class SqrtGGNMC(_MonteCarlo, ColumnsBySample):
    """Random columns, ``[M, N, *P]``, M = ``mc_samples``."""

    subsampling: Sequence[int] | None = None
    savefield = "sqrt_ggn_mc"

    def __post_init__(self) -> None:
        _MonteCarlo.__post_init__(self)
        ColumnsBySample.__post_init__(self)


@dataclass(frozen=True)
class GGNBlock(_Exact, _FactorReading):
    """The parameter's whole block of the Gauss-Newton matrix, ``[P, P]``, P its number of entries."""

    savefield = "ggn_block"

    def terms(self, found: Arrived, target: Target) -> list[Tensor]:
        columns = [*found.samples, *[Dense(w.columns.unsqueeze(1)) for w in found.whole]]
        return [c.block() for c in columns] + [torch.diag(d.h.flatten()) for d in found.diagonal]

    def zero(self, target: Target) -> Tensor:
        return target.tensor.new_zeros(target.tensor.numel(), target.tensor.numel())
