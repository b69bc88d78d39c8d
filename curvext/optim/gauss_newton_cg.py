"""Gauss-Newton by conjugate gradients, the method of Wang, Tan and Lin for convolutional networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..solvers import Armijo, LevenbergMarquardt, Solution, cg
from .base import Damping
from .batches import Subsample
from .krylov import KrylovOptimizer
from .lagged import Lagged
from .objective import Objective
from .point import Point, Products
from .precondition import Preconditioner, by_name
from .search import LineSearch, Report
from .stored import StoredGaussNewton


class GaussNewtonCG(KrylovOptimizer):
    """θ ← θ + α lr d, with (G + λ I) d ≈ -∇f by conjugate gradients, G the Gauss-Newton matrix of some of the data.

        optimizer = GaussNewtonCG(model.parameters(), weight_decay=1 / C, curvature_batch=Subsample(len(x), 0.05))
        loss = optimizer.step(closure)  # closure(rows=slice(None)) returns (loss, outputs)

    f and ∇f are those of ``closure()``, G that of ``closure(rows)``; without ``curvature_batch`` all come from the
    closure, or G from a second one. Wang, Tan and Lin take 5 % of the data for G, and minimise ‖θ‖² / 2C + 1/l Σ ξ with
    C = C_user l: give ``weight_decay=1 / C``, and mean losses. CG ends with ‖(G + λ I) d + ∇f‖ <= ``tolerance`` ‖∇f‖;
    then α = 1, ½, ... by Armijo's rule.

    λ follows Levenberg and Marquardt, with ρ the decrease over that of the model without damping,

        α ∇fᵀd + ½ α² dᵀG d,   dᵀG d = dᵀ(-∇f - r - λ d),   r = -∇f - (G + λ I) d,

    which needs no further product (one, if groups differ in ``lr``).

    Args:
        params, lr, weight_decay, maximize, curvature_batch: see :class:`~curvext.optim.base.ClosureOptimizer`.
        steps: of CG, at most; one product each.
        tolerance: see above.
        damping: a rule for λ. By default λ starts at 1, falls to ⅔ where ρ > ¾ and rises to 1½ where ρ < ¼; it does
            not rise where the line search has shortened the step, and starts again after two solves of one product,
            else it winds up where the loss has kinks. ``LevenbergMarquardt(guard=False)`` is the source's own.
        preconditioner: a name or an object of :mod:`curvext.optim.precondition`; the source has none.
        line_search: ``Armijo()``; ``None`` for α = 1 if that is lower, else no step.
        jacobian: ``"products"`` through the graph; ``"stored"``, what every output owes to every layer is kept for
            products without the graph (:mod:`curvext.optim.stored`), which was slower on the CPUs we have tried;
            ``"auto"``: stored if that takes less than ``max_memory`` bytes and can be had.
            ``report.details["jacobian"]`` says which.
        max_memory: see above.

    Source: Wang, Tan & Lin 2020, Newton methods for convolutional neural networks, https://arxiv.org/abs/1811.06100.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        steps: int = 250,
        tolerance: float = 0.1,
        damping: Damping | None = None,
        preconditioner: str | Preconditioner | Lagged | None = None,
        line_search: LineSearch | None = Armijo(),  # noqa: B008
        jacobian: str = "products",
        max_memory: int = 1 << 30,
        weight_decay: float = 0.0,
        maximize: bool = False,
        curvature_batch: Subsample | None = None,
    ):
        if steps < 1 or not 0 <= tolerance < 1:
            raise ValueError(f"GaussNewtonCG: steps={steps} >= 1 and 0 <= tolerance={tolerance} < 1 are needed")
        if jacobian not in ("products", "stored", "auto"):
            raise ValueError(f"GaussNewtonCG: jacobian={jacobian!r} must be 'products', 'stored' or 'auto'")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}, curvature_batch)
        self.steps, self.tolerance, self.line_search = steps, tolerance, line_search
        self.jacobian, self.max_memory = jacobian, max_memory
        self.damping, self.preconditioner = damping or LevenbergMarquardt(), by_name(preconditioner)

    def _step(self, objective: Objective) -> Report:
        point = objective.point(products=objective.curvature_closure is None and "gauss_newton")
        curved, g = objective.curved(point), point.gradient
        λ, G = self._strength, self._matrix(curved)
        solution, said = self._solved(cg, G, -g, curved, λ, tolerance=self.tolerance, steps=self.steps)
        d, α = solution.x, objective.lr
        κ = α**2 * undamped(solution, g, λ) if isinstance(α, float) else float((α * d).dot(G @ (α * d)))
        name = f"Gauss-Newton ({solution.reason})"
        found = objective.search(point, self.line_search, {name: d, "steepest descent": -g})
        ratio = found.ratio(point, float(g.dot(α * d)), κ) if found.name == name else -torch.inf
        self._damp(λ, ratio, found.step.size, solution.steps)
        details = {"damping": λ, "ratio": ratio, "curvature": κ, "solver": solution.reason,
                   "jacobian": "stored" if isinstance(G, StoredGaussNewton) else "products", **said}  # fmt: skip
        return found.report(point, curved.products, **details)

    def _matrix(self, curved: Point) -> Products | StoredGaussNewton:
        """By the mode; what the first step has found out about ``"auto"`` holds for the next ones."""
        products, known = curved.curvature("gauss_newton"), self.carried.get("stored")
        never = self.jacobian == "products" or (self.jacobian == "auto" and known is False)
        if never or (self.jacobian == "auto" and _bytes(curved) > self.max_memory):
            return products
        try:
            stored = StoredGaussNewton(curved, check=not known)
        except CurvatureError:
            if self.jacobian == "stored":
                raise
            self.carried["stored"] = False
            return products
        self.carried["stored"] = True
        return stored


def _bytes(point: Point) -> int:
    """About what a stored Jacobian takes: as many activations as a sample has outputs."""
    outputs = sum(z[:1].numel() if z.dim() else 1 for z in point.graph.term.outputs)
    return outputs * point.graph.column_bytes


def undamped(solution: Solution, g: Tensor, damping: float) -> float:
    """dᵀG d where CG ended on (G + λ I) d = -g, from the value of its model, φ = gᵀd + ½ dᵀ(G + λ I) d."""
    assert solution.values is not None
    return float(2 * (solution.values[-1] - g.dot(solution.x)) - damping * solution.x.dot(solution.x))
