"""Preconditioners for CG: objects called as ``preconditioner(point, damping)``, that return M near (A + δ I)⁻¹.

M is what :func:`curvext.solvers.cg` takes: an operator, a matrix, or a diagonal ``[P]``; symmetric positive definite. A
preconditioner changes how fast CG gets there, not where to. Your own may be any such callable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kronecker import Block, Kronecker
from ..operators.structured import BlockDiagonal, KroneckerBlock
from ..quantities import KFAC, KFLR, BatchL2Grad, DiagGGNExact, DiagGGNMC, HesScale, SumGradSquared
from .point import Point

Preconditioner = Callable[[Point, float], Any]


@dataclass(frozen=True)
class DiagonalPreconditioner:
    """1 / (|d| + weight decay + δ)^``power``, d a diagonal that a quantity of ``extend`` leaves on parameters.

    Args:
        quantity: ``HesScale()``, ``DiagGGNExact()``, ...
        power: Martens takes 0.75.
        floor: δ is at least this fraction of the mean of the rest, so that M is finite where d is zero.
    """

    quantity: Any = HesScale()  # noqa: RUF009
    power: float = 1.0
    floor: float = 1e-3

    def __call__(self, point: Point, damping: float) -> Tensor:
        """M as a diagonal ``[P]``."""
        d = self.diagonal(point) + point.objective.decay
        floor = self.floor * d.mean()
        shift = torch.clamp(floor, min=damping)
        return torch.where(floor > 0, (d + shift) ** -self.power, torch.ones_like(d))

    def diagonal(self, point: Point) -> Tensor:
        """|d| ``[P]``."""
        found = point.quantities(self.quantity, generator=_fixed(point))
        return _flat(point, found[self.quantity.savefield]).abs()


@dataclass(frozen=True)
class FisherPreconditioner(DiagonalPreconditioner):
    """(d + weight decay + δ)^-¾, d the diagonal of the empirical Fisher matrix, 1/N Σ_n (∇ℓ_n)² for a mean of ℓ_n.

    Args:
        quantity: Σ_n g_n².
        power, floor: as in :class:`DiagonalPreconditioner`.
        mean: whether the loss is a mean over samples; otherwise a sum, and d = Σ_n (∇ℓ_n)².

    Source: Martens 2010, section 4.7.
    """

    quantity: Any = SumGradSquared()  # noqa: RUF009
    power: float = 0.75
    mean: bool = True

    def diagonal(self, point: Point) -> Tensor:
        """d ``[P]``."""
        found = point.quantities(self.quantity, BatchL2Grad())
        squares = _flat(point, found[self.quantity.savefield])
        return squares * len(next(iter(found.batch_l2.values()))) if self.mean else squares


@dataclass(frozen=True)
class KroneckerPreconditioner:
    """(A ⊗ B + (weight decay + δ) I)⁻¹ for every parameter, from Kronecker factors of the Gauss-Newton matrix.

    Args:
        quantity: ``KFLR()``, ``KFAC()``; draws of the latter are the same at every step.
        pi: divide the damping among the factors, by Cholesky, as K-FAC does; else exactly, by eigenvectors.
        floor: weight decay + δ is at least this fraction of a block's mean eigenvalue.
    """

    quantity: Any = KFLR()  # noqa: RUF009
    pi: bool = True
    floor: float = 1e-3

    def __call__(self, point: Point, damping: float) -> BlockDiagonal:
        """M as an operator."""
        objective = point.objective
        factors = point.quantities(self.quantity, generator=_fixed(point))[self.quantity.savefield]
        shifts = objective.split(objective.decay + damping + torch.zeros_like(objective.start))
        blocks = []
        for i, (p, shift) in enumerate(zip(objective.parameters, shifts, strict=True)):
            found = factors.get(str(i), [p.new_zeros(p.numel())])
            block = Kronecker(tuple(found), tuple(p.shape))  # type: ignore[arg-type]
            blocks.append(KroneckerBlock(self._inverse(block, shift)))
        return BlockDiagonal(blocks)

    def _inverse(self, block: Kronecker, shift: Tensor) -> Block:
        mean = block.trace() / block.shape[0]
        shift = torch.maximum(shift.flatten()[0].to(mean), self.floor * mean)
        return block.inverse(torch.where(shift + mean > 0, shift, torch.ones_like(shift)), self.pi)


NAMED: dict[str, Preconditioner] = {
    "hesscale": DiagonalPreconditioner(HesScale()),
    "hesscale_gn": DiagonalPreconditioner(HesScale(gauss_newton=True)),
    "diag_ggn_exact": DiagonalPreconditioner(DiagGGNExact()),
    "diag_ggn_mc": DiagonalPreconditioner(DiagGGNMC()),
    "fisher": FisherPreconditioner(),
    "kfac": KroneckerPreconditioner(KFAC()),
    "kflr": KroneckerPreconditioner(KFLR()),
}


def preconditioner(given: str | Preconditioner | None) -> Preconditioner | None:
    """By name, or as it is."""
    if isinstance(given, str) and given not in NAMED:
        raise ValueError(f"preconditioner={given!r}: one of {', '.join(NAMED)}, or a callable (point, damping) -> M")
    return NAMED[given] if isinstance(given, str) else given


def _flat(point: Point, found: Mapping[str, Tensor]) -> Tensor:
    """``[P]``; zero for parameters that the loss does not depend on."""
    parameters = enumerate(point.objective.parameters)
    return torch.cat([found.get(str(i), torch.zeros_like(p)).flatten() for i, p in parameters]).to(point.theta)


def _fixed(point: Point) -> torch.Generator:
    """The same draws at every step."""
    return torch.Generator(point.theta.device).manual_seed(0)
