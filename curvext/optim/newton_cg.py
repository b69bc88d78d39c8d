"""Newton's method with a line search, its equations solved by conjugate gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..solvers import Armijo, Solution, cg, minres
from .base import Damping
from .batches import Subsample
from .krylov import KrylovOptimizer
from .lagged import Lagged
from .objective import Objective
from .point import Products
from .precondition import Preconditioner, by_name
from .search import LineSearch, Report


class NewtonCG(KrylovOptimizer):
    """θ ← θ + α lr p, with (A + δ I) p ≈ -∇f by conjugate gradients, A the Hessian or the Gauss-Newton matrix.

        optimizer = NewtonCG(model.parameters())
        loss = optimizer.step(lambda: loss_fn(model(x), y))

    CG ends with ‖A p + ∇f‖ <= min(½, √‖∇f‖) ‖∇f‖, which makes convergence superlinear, or where it meets negative
    curvature: with the iterate before that, or along -∇f at its first step. It therefore never goes up, and it stays at
    a saddle whose gradient is zero (:class:`~curvext.optim.SaddleFreeNewton` leaves it).

    Args:
        params, lr, weight_decay, maximize, curvature_batch: see :class:`~curvext.optim.base.ClosureOptimizer`.
        curvature: ``"hessian"``, or ``"gauss_newton"`` for closures that return ``(loss, outputs)``.
        steps: of CG, at most; one product each.
        tolerance: ‖A p + ∇f‖ / ‖∇f‖ in place of the rule above.
        solver: ``"cg"``; or ``"minres"``, for Hessians that are far from positive definite: where it meets negative
            curvature, it ends and goes on along that, as far as the curvature's size says (Liu & Roosta).
        negative: ``"stop"`` at negative curvature as above, or go on with its ``"absolute"`` value (CG).
        damping: a rule for δ, as ``LevenbergMarquardt()`` or ``Constant(1e-3)``, for one product more a step; the ratio
            is that of the undamped model.
        preconditioner: a name ("hesscale", "fisher", "kflr", ...) or an object of :mod:`curvext.optim.precondition`;
            computed at every step, unless it is :class:`~curvext.optim.Lagged`.
        line_search: ``Armijo()``, ``StrongWolfe()``; ``None`` for α = 1 if that is lower, else no step.

    Sources: Nocedal and Wright, Numerical Optimization, algorithm 7.1; Liu and Roosta 2022, A Newton-MR algorithm with
    complexity guarantees (MINRES).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        curvature: str = "hessian",
        steps: int = 250,
        tolerance: float | None = None,
        solver: str = "cg",
        negative: str = "stop",
        damping: Damping | None = None,
        preconditioner: str | Preconditioner | Lagged | None = None,
        line_search: LineSearch | None = Armijo(),  # noqa: B008
        weight_decay: float = 0.0,
        maximize: bool = False,
        curvature_batch: Subsample | None = None,
    ):
        if curvature not in ("hessian", "gauss_newton") or negative not in ("stop", "absolute"):
            raise ValueError(f"NewtonCG: curvature={curvature!r}, negative={negative!r}: 'hessian' or 'gauss_newton', "
                             "and 'stop' or 'absolute'")  # fmt: skip
        if solver not in ("cg", "minres") or (solver == "minres" and negative != "stop"):
            raise ValueError(f"NewtonCG: solver={solver!r}: 'cg', or 'minres' with negative='stop'")
        if steps < 1 or not (tolerance is None or 0 <= tolerance < 1):
            raise ValueError(f"NewtonCG: steps={steps} >= 1 and 0 <= tolerance={tolerance} < 1 are needed")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}, curvature_batch)
        self.curvature, self.solver, self.steps, self.negative = curvature, solver, steps, negative
        self.tolerance, self.damping, self.line_search = tolerance, damping, line_search
        self.preconditioner = by_name(preconditioner)

    def _step(self, objective: Objective) -> Report:
        point = objective.point(products=objective.curvature_closure is None and self.curvature)
        curved = objective.curved(point)
        A, g, δ = curved.curvature(self.curvature), point.gradient, self._strength
        superlinear = min(0.5, math.sqrt(float(torch.linalg.vector_norm(g))))
        tolerance = superlinear if self.tolerance is None else self.tolerance
        options = {"tolerance": tolerance, "steps": self.steps, "negative": self.negative}
        solution, said = self._solved(cg if self.solver == "cg" else minres, A, -g, curved, δ, **options)
        name, p = direction(solution, g, self.solver == "minres")
        slope, κ = self._model(A, objective.lr * p, g)
        found = objective.search(point, self.line_search, {name: p, "steepest descent": -g})
        details = {"damping": δ, "solver": solution.reason, **said}
        if self.damping is not None:
            ratio = found.ratio(point, slope, κ) if found.name == name else -math.inf
            details["ratio"] = ratio
            self._damp(δ, ratio, found.step.size, solution.steps)
        return found.report(point, curved.products, **details)

    def _model(self, A: Products, d: Tensor, g: Tensor) -> tuple[float, float]:
        """gᵀd and dᵀA d, where the damping rule needs them."""
        return (float(g.dot(d)), float(d.dot(A @ d))) if self.damping is not None else (0.0, 0.0)


def direction(solution: Solution, g: Tensor, always: bool) -> tuple[str, Tensor]:
    """Where the solver ended, and from there along negative curvature; not ``always``: if it has got nowhere."""
    x, d = solution.x, solution.direction
    if d is not None and (always or not bool(x.any())):
        return "negative curvature", x + d
    return (f"Newton ({solution.reason})", x) if bool(x.any()) else ("steepest descent", -g)
