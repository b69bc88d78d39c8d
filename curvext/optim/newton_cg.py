"""Newton's method with a line search, its equations solved by conjugate gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..solvers import Armijo, Solution, cg
from .base import ClosureOptimizer, Damping
from .objective import Objective
from .point import Point, Products
from .precondition import Preconditioner, preconditioner
from .search import LineSearch, Report


class NewtonCG(ClosureOptimizer):
    """θ ← θ + α lr p, with (A + δ I) p ≈ -∇f by conjugate gradients, A the Hessian or the Gauss-Newton matrix.

        optimizer = NewtonCG(model.parameters(), curvature="gauss_newton")
        loss = optimizer.step(lambda: ((z := model(x)), y)[::-1])

    CG ends with ‖A p + ∇f‖ <= min(½, √‖∇f‖) ‖∇f‖, which makes convergence superlinear, or where it meets negative
    curvature: with the iterate before that, or along -∇f at its first step. It therefore never goes up, and it stays at
    a saddle whose gradient is zero (:class:`~curvext.optim.SaddleFreeNewton` leaves it).

    Args:
        params, lr, weight_decay, maximize: see :class:`~curvext.optim.base.ClosureOptimizer`.
        curvature: ``"hessian"``, or ``"gauss_newton"`` for closures that return ``(loss, outputs)``.
        steps: of CG, at most; one product each.
        tolerance: ‖A p + ∇f‖ / ‖∇f‖ in place of the rule above.
        negative: ``"stop"`` at negative curvature as above, or go on with its ``"absolute"`` value.
        damping: a rule for δ, as ``LevenbergMarquardt()`` or ``Constant(1e-3)``, for one product more a step; the ratio
            is that of the undamped model.
        preconditioner: a name ("hesscale", "fisher", "kflr", ...) or an object of :mod:`curvext.optim.precondition`.
        line_search: ``Armijo()``, ``StrongWolfe()``; ``None`` for α = 1 if that is lower, else no step.

    Source: Nocedal and Wright, Numerical Optimization, algorithm 7.1.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        curvature: str = "hessian",
        steps: int = 250,
        tolerance: float | None = None,
        negative: str = "stop",
        damping: Damping | None = None,
        preconditioner: str | Preconditioner | None = None,
        line_search: LineSearch | None = Armijo(),  # noqa: B008
        weight_decay: float = 0.0,
        maximize: bool = False,
    ):
        if curvature not in ("hessian", "gauss_newton") or negative not in ("stop", "absolute"):
            raise ValueError(f"NewtonCG: curvature={curvature!r}, negative={negative!r}: 'hessian' or 'gauss_newton', "
                             "and 'stop' or 'absolute'")  # fmt: skip
        if steps < 1 or not (tolerance is None or 0 <= tolerance < 1):
            raise ValueError(f"NewtonCG: steps={steps} >= 1 and 0 <= tolerance={tolerance} < 1 are needed")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})
        self.curvature, self.steps, self.tolerance, self.negative = curvature, steps, tolerance, negative
        self.damping, self.preconditioner, self.line_search = damping, _preconditioner(preconditioner), line_search

    def _step(self, objective: Objective) -> Report:
        point = objective.point(products=objective.curvature_closure is None and self.curvature)
        curved = objective.curved(point)
        A, g = curved.curvature(self.curvature), point.gradient
        δ = self.carried.get("damping", getattr(self.damping, "first", 0.0))
        solution = self._solve(A, curved, g, δ)
        name, p = direction(solution, g)
        slope, κ = self._model(A, objective.lr * p, g)
        found = objective.search(point, self.line_search, {name: p, "steepest descent": -g})
        details = {"damping": δ, "solver": solution.reason}
        if self.damping is not None:
            ratio = found.ratio(point, slope, κ) if found.name == name else -math.inf
            details["ratio"] = ratio
            self._damp(δ, ratio, found.step.size, solution.products)
        return found.report(point, curved.products, **details)

    def _solve(self, A: Products, curved: Point, g: Tensor, δ: float) -> Solution:
        M = None if self.preconditioner is None else self.preconditioner(curved, δ)
        tolerance = min(0.5, math.sqrt(float(torch.linalg.vector_norm(g))))
        solution = cg(
            A,
            -g,
            damping=δ,
            preconditioner=M,
            tolerance=tolerance if self.tolerance is None else self.tolerance,
            steps=self.steps,
            negative=self.negative,
        )
        if solution.reason == "preconditioner not positive definite":
            raise CurvatureError(f"NewtonCG: the preconditioner {self.preconditioner} is not positive definite")
        return solution

    def _model(self, A: Products, d: Tensor, g: Tensor) -> tuple[float, float]:
        """gᵀd and dᵀA d, where the damping rule needs them."""
        return (float(g.dot(d)), float(d.dot(A @ d))) if self.damping is not None else (0.0, 0.0)

    def _damp(self, δ: float, ratio: float, size: float, products: int) -> None:
        assert self.damping is not None
        short = self.carried.get("short", 0) + 1 if products <= 1 else 0
        self.carried["short"] = short
        self.carried["damping"] = self.damping(δ, ratio, step=size, short=short)


def direction(solution: Solution, g: Tensor) -> tuple[str, Tensor]:
    """Where CG ended; or where it began, if there was no positive curvature there."""
    if bool(solution.x.any()):
        return f"Newton ({solution.reason})", solution.x
    met = solution.direction is not None
    return ("negative curvature", solution.direction) if met else ("steepest descent", -g)  # type: ignore[return-value]


_preconditioner = preconditioner
