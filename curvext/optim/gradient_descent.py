"""Gradient descent with a line search."""

from __future__ import annotations

from typing import Any

from ..solvers import Armijo
from .base import ClosureOptimizer
from .objective import Objective
from .search import LineSearch, Report


class GradientDescent(ClosureOptimizer):
    """θ ← θ - α lr ∇f, with α from Armijo's backtracking: the yardstick for the others.

        optimizer = GradientDescent(model.parameters())
        loss = optimizer.step(lambda: loss_fn(model(x), y))

    Args:
        params, lr, weight_decay, maximize: see :class:`~curvext.optim.base.ClosureOptimizer`; ``lr`` is the first step
            size tried.
        line_search: ``Armijo()``, ``StrongWolfe()``; ``FullStep()``; ``None`` for α = 1 if that is lower.

    Source: Nocedal and Wright, Numerical Optimization, algorithm 3.1.
    """

    second_order = False

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        line_search: LineSearch | None = Armijo(),  # noqa: B008
        weight_decay: float = 0.0,
        maximize: bool = False,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize})
        self.line_search = line_search

    def _step(self, objective: Objective) -> Report:
        point = objective.point(products=False)
        return objective.search(point, self.line_search, {"steepest descent": -point.gradient}).report(point)
