"""CurveBall: the gradient and the step before, weighed by the Gauss-Newton matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..solvers import Armijo, LevenbergMarquardt
from .base import ClosureOptimizer, Damping
from .batches import Subsample
from .objective import Objective
from .point import Products
from .search import LineSearch, Report


class CurveBall(ClosureOptimizer):
    """θ ← θ + α lr z,  z ← μ z - β ((G + λ I) z + ∇f): one step of a linear solver for every step of θ.

        optimizer = CurveBall(model.parameters())
        loss = optimizer.step(closure)  # returns (loss, outputs)

    β and μ minimise the model ∇fᵀz + ½ zᵀ(G + λ I) z over both, for two products a step, so that z descends. λ follows
    Levenberg and Marquardt, with λ in the model, every ``interval`` steps; groups that differ in ``lr`` take one
    product more then.

    Args:
        params, lr, weight_decay, maximize, curvature_batch: see :class:`~curvext.optim.base.ClosureOptimizer`.
        damping: a rule for λ. By default λ starts at 1, falls by 0.999⁵ where ρ > 3/2 and rises so where ρ < 1/2.
        interval: see above.
        line_search: for α; ``FullStep(always=True)`` as in the source; ``None`` for α = 1 if that is lower.

    Source: Henriques et al. 2018, Small steps and giant leaps, https://arxiv.org/abs/1805.08095.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        damping: Damping | None = None,
        interval: int = 5,
        line_search: LineSearch | None = Armijo(),  # noqa: B008
        weight_decay: float = 0.0,
        maximize: bool = False,
        curvature_batch: Subsample | None = None,
    ):
        if interval < 1:
            raise ValueError(f"CurveBall: interval={interval} >= 1 is needed")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}, curvature_batch)
        rate = 0.999**5
        self.damping = damping or LevenbergMarquardt(low=0.5, high=1.5, boost=1 / rate, drop=rate, guard=False)
        self.interval, self.line_search = interval, line_search

    def _step(self, objective: Objective) -> Report:
        point = objective.point(products=objective.curvature_closure is None and "gauss_newton")
        curved, g = objective.curved(point), point.gradient
        λ = self._strength
        count = self.carried["steps"] = self.carried.get("steps", 0) + 1
        before, G = self.recall("z", objective), curved.curvature("gauss_newton")
        z, factors, κ = _update(G, g, λ, torch.zeros_like(g) if before is None else before)
        due, d = count % self.interval == 0, objective.lr * z
        if due:
            one = isinstance(objective.lr, float)
            κ = objective.lr**2 * κ if one else float(d.dot(G @ d + λ * d))
        found = objective.search(point, self.line_search, {"CurveBall": z, "steepest descent": -g})
        ratio = found.ratio(point, float(g.dot(d)), κ) if found.name == "CurveBall" else -math.inf
        if due:
            self.carried["damping"] = self.damping(λ, ratio, step=found.step.size)
        self.remember("z", found.step.size * z if found.name == "CurveBall" else torch.zeros_like(z), objective)
        details = {"damping": λ, "beta": factors[0], "mu": -factors[1], **({"ratio": ratio} if due else {})}
        return found.report(point, curved.products, **details)


def _update(G: Products, g: Tensor, λ: float, z: Tensor) -> tuple[Tensor, list[float], float]:
    """The next z, the factors β and -μ, and the curvature zᵀ(G + λ I) z of the next z."""
    Gz = G @ z + λ * z if bool(z.any()) else torch.zeros_like(z)
    Δ = Gz + g
    B, GB = torch.stack([Δ, z]), torch.stack([G @ Δ + λ * Δ, Gz])
    K, rhs = (B @ GB.mT).cpu().double(), (B @ g).cpu().double()
    unit = K.diagonal().clamp(min=0).sqrt()
    unit = torch.where(unit > 0, unit, 1)  # the two vectors' lengths may be far apart
    factors = torch.linalg.pinv((K + K.mT) / 2 / unit / unit[:, None], hermitian=True) @ (rhs / unit) / unit
    return -(factors.to(B) @ B), factors.tolist(), float(factors @ K @ factors)
