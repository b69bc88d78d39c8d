"""L-BFGS with a line search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..solvers import Armijo
from .base import ClosureOptimizer
from .objective import Objective
from .point import Point
from .search import Found, LineSearch, Report


class LBFGS(ClosureOptimizer):
    """θ ← θ - α lr H ∇f, H the inverse Hessian that L-BFGS makes of the last pairs s = Δθ, y = Δ∇f.

        optimizer = LBFGS(model.parameters(), line_search=StrongWolfe())
        loss = optimizer.step(lambda: loss_fn(model(x), y))

    One step of the method a ``step()``. Both gradients of a pair come from the same closure, so that pairs are right
    on mini-batches too; that takes a gradient more a step than a full batch would need. A pair with sᵀy <= 1e-10 yᵀy
    is skipped: Armijo's rule alone does not make sᵀy positive, the strong Wolfe conditions do. Where the direction does
    not lead down, pairs are dropped, and the step goes along the gradient.

    Args:
        params, lr, weight_decay, maximize: see :class:`~curvext.optim.base.ClosureOptimizer`.
        memory: pairs that are kept.
        line_search: ``Armijo()`` or ``StrongWolfe()``.

    Source: Nocedal and Wright, Numerical Optimization, algorithms 7.4 and 7.5; the first step is along
    -∇f / max(1, ‖∇f‖).
    """

    second_order = False

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        memory: int = 10,
        line_search: LineSearch | None = Armijo(),  # noqa: B008
        weight_decay: float = 0.0,
        maximize: bool = False,
    ):
        if memory < 1:
            raise ValueError(f"LBFGS: memory must be >= 1, got {memory}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})
        self.memory, self.line_search = memory, line_search

    def _step(self, objective: Objective) -> Report:
        point = objective.point(products=False)
        g = point.gradient
        s, y = self.recall("s", objective), self.recall("y", objective)
        directions = {"steepest descent": -g / max(1.0, float(torch.linalg.vector_norm(g)))}
        if s is not None and y is not None:
            directions = {"L-BFGS": -two_loops(g, s, y), **directions}
        found = objective.search(point, self.line_search, directions, points=True)
        if found.name != "L-BFGS":
            s = y = None
        kept = found.name is not None and self._keep(objective, point, found, s, y)
        held = self.recall("s", objective)
        return found.report(point, pairs=0 if held is None else len(held), kept=kept)

    def _keep(self, objective: Objective, point: Point, found: Found, s: Tensor | None, y: Tensor | None) -> bool:
        """The newest pair, if it has positive curvature, and those before."""
        there = found.point or objective.point(found.d, products=False)
        pair = found.d[None], (there.gradient - point.gradient)[None]
        positive = bool((pair[0] * pair[1]).sum() > 1e-10 * pair[1].square().sum())
        rows = (s, pair[0]), (y, pair[1])
        for name, (old, new) in zip("sy", rows, strict=True):
            kept = [v for v in (old, new if positive else None) if v is not None]
            if kept:
                self.remember(name, torch.cat(kept)[-self.memory :], objective)
            else:
                self.forget(name)
        return positive


def two_loops(g: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """H g, for pairs s, y ``[m, P]``, oldest first, and H₀ = sᵀy / yᵀy of the last pair."""
    ρ = 1 / (s * y).sum(1)
    α = torch.zeros_like(ρ)
    q = g
    for i in reversed(range(len(s))):
        α[i] = ρ[i] * s[i].dot(q)
        q = q - α[i] * y[i]
    q = q / (ρ[-1] * y[-1].square().sum())
    for i in range(len(s)):
        q = q + (α[i] - ρ[i] * y[i].dot(q)) * s[i]
    return q
