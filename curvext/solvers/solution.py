"""What every solver returns, and what it checks of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        x: ``[P]``, or ``[P, K]`` for K right-hand sides.
        residuals: ``[steps + 1]`` (or ``[steps + 1, K]``): the norm that the solver makes small, from the start on.
        converged: whether the solver met its tolerance, for every column.
        products: products with the operator (and its adjoint), columns counted one by one.
        reason: why it stopped; for K columns, one text each.
        values: CG: ``[steps + 1]``, the quadratic model ½ xᵀAx - bᵀx of every iterate.
        direction: CG, MINRES: where pᵀAp <= 0 was met, that p (MINRES: scaled), with bᵀp > 0 where x was zero at the
            start; else ``None``.
        curvature: CG: pᵀAp / pᵀp of ``direction``.
        iterates: CG with ``store``: iterates by step, the last one among them.
    """

    x: Tensor
    residuals: Tensor
    converged: bool
    products: int
    reason: str | tuple[str, ...]
    values: Tensor | None = None
    direction: Tensor | None = None
    curvature: Tensor | None = None
    iterates: dict[int, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Iterations done."""
        return len(self.residuals) - 1


def check(operator: Any, b: Tensor, columns: bool = False, square: bool = True) -> Tensor:
    """b without its graph; refuse an operator and a right-hand side that do not fit."""
    m, n = operator.shape
    if square and m != n:
        raise CurvatureError(f"a symmetric operator is needed, not one of shape ({m}, {n}); lsmr takes any")
    if b.dim() not in ((1, 2) if columns else (1,)) or b.shape[0] != m:
        takes = "a vector [P] or columns [P, K]" if columns else "one vector [P]"
        raise CurvatureError(f"an operator of shape ({m}, {n}) and {takes}: got a tensor of shape {tuple(b.shape)}")
    if not b.is_floating_point():
        raise CurvatureError(f"a real floating point vector is needed, not {b.dtype}")
    return b.detach()


def times(operator: Any, v: Tensor) -> Tensor:
    """A v without its graph, so that a long run does not keep all of its past alive."""
    product: Tensor = (operator @ v).detach()
    if product.shape[1:] != v.shape[1:]:
        raise CurvatureError(
            f"the operator @ a tensor of shape {tuple(v.shape)} gave one of shape {tuple(product.shape)}; "
            "a vector [P] is to give a vector, columns [P, K] columns"
        )
    return product


def damped(operator: Any, damping: float) -> Callable[[Tensor], Tensor]:
    """v -> (A + δ I) v."""
    return lambda v: times(operator, v) + damping * v if damping else times(operator, v)


def preconditioned(preconditioner: Any, b: Tensor) -> Callable[[Tensor], Tensor]:
    """r -> M r, M an operator, a matrix or the entries ``[P]`` of a diagonal one, near the inverse of A."""
    if preconditioner is None:
        return lambda r: r
    n = b.shape[0]
    if tuple(preconditioner.shape) == (n, n):
        return lambda r: times(preconditioner, r)
    if isinstance(preconditioner, Tensor) and preconditioner.shape == (n,):
        diagonal = preconditioner.detach().unsqueeze(1) if b.dim() == 2 else preconditioner.detach()
        return lambda r: diagonal * r
    raise CurvatureError(
        f"a preconditioner of shape {tuple(preconditioner.shape)} for {n} unknowns: give an operator or a matrix "
        f"({n}, {n}), or the diagonal ({n},), near the inverse of the operator"
    )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """aᵀb, column by column."""
    return (a * b).sum(0)


def norm(a: Tensor) -> Tensor:
    """‖a‖, column by column."""
    return torch.linalg.vector_norm(a, dim=0)


def where(active: Tensor, value: Tensor) -> Tensor:
    """``value`` in the columns that are active, zero in the others, whatever they hold."""
    return torch.where(active, value, torch.zeros_like(value))
