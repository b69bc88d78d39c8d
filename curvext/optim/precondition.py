"""Preconditioners: objects called as ``preconditioner(point, damping)``, that return M near (A + δ I)⁻¹.

M is what :func:`curvext.solvers.cg` takes: an operator, a matrix, or a diagonal ``[P]``; symmetric positive definite. A
preconditioner changes how fast solvers get there, not where to. Your own may be any such callable; one that is to be
kept for several steps (:class:`~curvext.optim.Lagged`) is an :class:`Approximation`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hierarchical.build import PROBES, Probes
from ..hierarchical.factor import Factorization
from ..hierarchical.hodlr import HierarchicalOperator
from ..hierarchical.peel import Source
from ..hierarchical.tree import ClusterTree
from ..kronecker import Block, Kronecker
from ..operators.structured import BlockDiagonal, KroneckerBlock
from ..quantities import KFAC, KFLR, BatchL2Grad, DiagGGNExact, DiagGGNMC, HesScale, SumGradSquared
from .lagged import Lagged
from .objective import Objective
from .point import Point

Preconditioner = Callable[[Point, float], Any]


class Approximation(ABC):
    """A preconditioner in two parts: Â near A, which costs passes over the data, and (Â + δ I)⁻¹, which costs none.

    Â is made of tensors in lists and dicts, so that a ``state_dict()`` can hold it.
    """

    @abstractmethod
    def approximate(self, point: Point, damping: float) -> Any:
        """Â."""

    @abstractmethod
    def inverse(self, approximation: Any, objective: Objective, damping: float) -> Any:
        """M."""

    def drift(self, approximation: Any, point: Point) -> float | None:
        """The error of Â here, over what it was where Â was computed; ``None``: it cannot be told."""
        return None

    def __call__(self, point: Point, damping: float) -> Any:
        return self.inverse(self.approximate(point, damping), point.objective, damping)


@dataclass(frozen=True)
class DiagonalPreconditioner(Approximation):
    """1 / (|d| + weight decay + δ)^``power``, d a diagonal that a quantity of ``extend`` leaves on parameters.

    Args:
        quantity: ``HesScale()``, ``DiagGGNExact()``, ...
        power: Martens takes 0.75.
        floor: δ is at least this fraction of the mean of the rest, so that M is finite where d is zero.
    """

    quantity: Any = HesScale()  # noqa: RUF009
    power: float = 1.0
    floor: float = 1e-3

    def approximate(self, point: Point, damping: float) -> Tensor:
        """|d| ``[P]``."""
        found = point.quantities(self.quantity, generator=_fixed(point))
        return _flat(point, found[self.quantity.savefield]).abs()

    def inverse(self, approximation: Tensor, objective: Objective, damping: float) -> Tensor:
        """M as a diagonal ``[P]``."""
        d = approximation + objective.decay
        floor = self.floor * d.mean()
        shift = torch.clamp(floor, min=damping)
        return torch.where(floor > 0, (d + shift) ** -self.power, torch.ones_like(d))


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

    def approximate(self, point: Point, damping: float) -> Tensor:
        """d ``[P]``."""
        found = point.quantities(self.quantity, BatchL2Grad())
        squares = _flat(point, found[self.quantity.savefield])
        return squares * len(next(iter(found.batch_l2.values()))) if self.mean else squares


@dataclass(frozen=True)
class KroneckerPreconditioner(Approximation):
    """(A ⊗ B + (weight decay + δ) I)⁻¹ for every parameter, from Kronecker factors of the Gauss-Newton matrix.

    Args:
        quantity: ``KFLR()``, ``KFAC()``; draws of the latter are the same at every step.
        pi: divide the damping among the factors, by Cholesky, as K-FAC does; else exactly, by eigenvectors.
        floor: weight decay + δ is at least this fraction of a block's mean eigenvalue.
    """

    quantity: Any = KFLR()  # noqa: RUF009
    pi: bool = True
    floor: float = 1e-3

    def approximate(self, point: Point, damping: float) -> list[list[Tensor]]:
        """The factors of every parameter."""
        factors = point.quantities(self.quantity, generator=_fixed(point))[self.quantity.savefield]
        parameters = enumerate(point.objective.parameters)
        return [list(factors.get(str(i), [p.new_zeros(p.numel())])) for i, p in parameters]

    def inverse(self, approximation: list[list[Tensor]], objective: Objective, damping: float) -> BlockDiagonal:
        """M as an operator."""
        shifts = objective.split(objective.decay + damping + torch.zeros_like(objective.start))
        parts = zip(objective.parameters, approximation, shifts, strict=True)
        blocks = [self._inverse(Kronecker(tuple(factors), tuple(p.shape)), shift) for p, factors, shift in parts]
        return BlockDiagonal([KroneckerBlock(block) for block in blocks])

    def _inverse(self, block: Kronecker, shift: Tensor) -> Block:
        mean = block.trace() / block.shape[0]
        shift = torch.maximum(shift.flatten()[0].to(mean), self.floor * mean)
        return block.inverse(torch.where(shift + mean > 0, shift, torch.ones_like(shift)), self.pi)


FACTORED = ("lowrank", "hodlr", "nested", "lowrank+hodlr", "auto")


@dataclass(frozen=True)
class HierarchicalPreconditioner(Approximation):
    """(Â + δ I)⁻¹, Â a :class:`~curvext.operators.HierarchicalOperator` of the curvature, from products alone.

    They are many (about 170 for 32 floats a parameter of low rank; hundreds for blocks), so keep Â for several steps by
    :class:`~curvext.optim.Lagged`. Where Â + δ I is not positive definite, the least multiple of I is added that makes
    it so.

    Args:
        tolerance: ‖A - Â‖ / ‖A‖ in Frobenius norm.
        max_bytes: what Â may take; 32 floats a parameter, if neither is given.
        format: ``"lowrank"``, low rank and a diagonal, which serves most networks; ``"hodlr"`` or ``"nested"``, blocks
            off the diagonal, for parameters with places, such as fields; ``"lowrank+hodlr"``, both; ``"auto"``,
            whichever takes the fewest steps of CG, for the products of all.
        order: of parameters; ``"row"`` needs names (``model.named_parameters()``), else they are taken as they come.
        curvature: ``"gauss_newton"``, whatever the optimizer's own matrix is, or ``"hessian"``.
        max_products: refused beyond; P if not given, and at least 256.
        floor: δ is at least this fraction of the mean size of Â's diagonal.

    Raises:
        ValueError: for another format; ``"adaptive"`` blocks have no factorization.
    """

    tolerance: float | None = None
    max_bytes: int | None = None
    format: str = "lowrank"
    order: str | Tensor = "row"
    curvature: str = "gauss_newton"
    max_products: int | None = None
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if self.format not in FACTORED:
            raise ValueError(f"HierarchicalPreconditioner: format={self.format!r}: one of {', '.join(FACTORED)}")

    def approximate(self, point: Point, damping: float) -> dict[str, Any]:
        """What the operator is made of, and the error that later ones are compared with: 1 % or more."""
        A, most = point.curvature(self.curvature), self.max_bytes
        if self.tolerance is None and most is None:
            most = 32 * A.shape[0] * point.theta.element_size()
        found = HierarchicalOperator.from_operator(
            A, self.tolerance, max_bytes=most, format=self.format, order=self.order, generator=_fixed(point),
            max_products=self.max_products or max(A.shape[0], 256),
            shift=damping if self.format == "auto" else None,
        )  # fmt: skip
        error = max(1e-2, self.tolerance or 0.0, found.error or 0.0)
        return {"levels": found.levels, "leaves": found.leaves, "basis": found.basis, "values": found.values,
                "leaf": found.tree.leaf, "error": error}  # fmt: skip

    def _operator(self, approximation: Mapping[str, Any], objective: Objective) -> HierarchicalOperator:
        space = len(objective.start) if objective.domain is None else objective.domain
        tree = ClusterTree(space, approximation["leaf"], self.order)
        parts = [approximation[name] for name in ("levels", "leaves", "basis", "values")]
        return HierarchicalOperator(tree, *parts)

    def inverse(self, approximation: Mapping[str, Any], objective: Objective, damping: float) -> Factorization:
        """M as an operator."""
        operator = self._operator(approximation, objective)
        mean = float(operator.diagonal().abs().mean())
        return operator.factor(max(damping, self.floor * mean) or 1.0, compensate=True)  # type: ignore[no-any-return]

    def drift(self, approximation: Mapping[str, Any], point: Point) -> float:
        """By 16 products."""
        operator, A = self._operator(approximation, point.objective), point.curvature(self.curvature)
        probes = Probes(Source(A, operator.tree, operator.leaves, PROBES, _fixed(point, 1)))
        return probes.error(operator) / float(approximation["error"])


NAMED: dict[str, Preconditioner | Lagged] = {
    "hesscale": DiagonalPreconditioner(HesScale()),
    "hesscale_gn": DiagonalPreconditioner(HesScale(gauss_newton=True)),
    "diag_ggn_exact": DiagonalPreconditioner(DiagGGNExact()),
    "diag_ggn_mc": DiagonalPreconditioner(DiagGGNMC()),
    "fisher": FisherPreconditioner(),
    "kfac": KroneckerPreconditioner(KFAC()),
    "kflr": KroneckerPreconditioner(KFLR()),
    "lowrank": Lagged(HierarchicalPreconditioner()),
}


def by_name(given: str | Preconditioner | Lagged | None) -> Preconditioner | Lagged | None:
    """One of :data:`NAMED`, or what is given."""
    if isinstance(given, str) and given not in NAMED:
        raise ValueError(f"preconditioner={given!r}: one of {', '.join(NAMED)}, or a callable (point, damping) -> M")
    return NAMED[given] if isinstance(given, str) else given


def _flat(point: Point, found: Mapping[str, Tensor]) -> Tensor:
    """``[P]``; zero for parameters that the loss does not depend on."""
    parameters = enumerate(point.objective.parameters)
    return torch.cat([found.get(str(i), torch.zeros_like(p)).flatten() for i, p in parameters]).to(point.theta)


def _fixed(point: Point, seed: int = 0) -> torch.Generator:
    """The same draws at every step."""
    return torch.Generator(point.theta.device).manual_seed(seed)
