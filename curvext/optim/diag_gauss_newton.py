"""Gauss-Newton with the diagonal of its matrix."""

from __future__ import annotations

import math
from typing import Any

from ..quantities import DiagGGNExact
from ..solvers import Armijo, LevenbergMarquardt
from .base import ClosureOptimizer, Damping
from .batches import Subsample
from .objective import Objective
from .precondition import DiagonalPreconditioner
from .search import LineSearch, Report


class DiagGaussNewton(ClosureOptimizer):
    """θ ← θ + α lr s p,  p = -∇f / (diag(G) + λ), G the Gauss-Newton matrix.

        optimizer = DiagGaussNewton(model.parameters())
        loss = optimizer.step(closure)  # returns (loss, outputs)

    The diagonal knows nothing of how entries act together, so p is mostly far too long: s minimises the model with all
    of G along it, s = -∇fᵀp / pᵀ(G + λ I) p, for one product. λ follows Levenberg and Marquardt, with the model of all
    of G without damping; groups that differ in ``lr`` take one product more.

    Args:
        params, lr, weight_decay, maximize, curvature_batch: see :class:`~curvext.optim.base.ClosureOptimizer`.
        quantity: the diagonal: ``DiagGGNExact()``, ``DiagGGNMC()``, ``HesScale(gauss_newton=True)``, ...
        rescale: whether to take s; else s = 1.
        damping: a rule for λ. By default λ starts at 1e-2, falls to ⅔ where ρ > ¾ and rises to 1½ where ρ < ¼.
        floor: λ is at least this fraction of the diagonal's mean, in p.
        line_search: for α; ``None`` for α = 1 if that is lower, else no step.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        quantity: Any = DiagGGNExact(),  # noqa: B008
        rescale: bool = True,
        damping: Damping = LevenbergMarquardt(first=1e-2, guard=False),  # noqa: B008
        floor: float = 1e-3,
        line_search: LineSearch | None = Armijo(),  # noqa: B008
        weight_decay: float = 0.0,
        maximize: bool = False,
        curvature_batch: Subsample | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}, curvature_batch)
        self.diagonal, self.rescale = DiagonalPreconditioner(quantity, floor=floor), rescale
        self.damping, self.line_search = damping, line_search

    def _step(self, objective: Objective) -> Report:
        point = objective.point(products=objective.curvature_closure is None and "gauss_newton")
        curved, g = objective.curved(point), point.gradient
        λ = self._strength
        p, G = -self.diagonal(curved, λ) * g, curved.curvature("gauss_newton")
        κ = float(p.dot(G @ p))
        if self.rescale:
            s = _scale(κ + λ * float(p.dot(p)), float(g.dot(p)))
            p, κ = s * p, s**2 * κ
        d, α = objective.lr * p, objective.lr
        κ = α**2 * κ if isinstance(α, float) else float(d.dot(G @ d))
        found = objective.search(point, self.line_search, {"diagonal": p, "steepest descent": -g})
        ratio = found.ratio(point, float(g.dot(d)), κ) if found.name == "diagonal" else -math.inf
        self.carried["damping"] = self.damping(λ, ratio, step=found.step.size)
        return found.report(point, curved.products, damping=λ, ratio=ratio)


def _scale(curvature: float, slope: float) -> float:
    """s of the class's docstring; 1 where the model is linear along p."""
    return -slope / curvature if curvature > 0 else 1.0
