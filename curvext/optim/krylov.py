"""What optimizers share that solve (A + δ I) d = -∇f by preconditioned Krylov methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import CurvatureError
from ..solvers import Solution
from .base import ClosureOptimizer
from .lagged import Lagged
from .point import Point
from .precondition import Preconditioner


class KrylovOptimizer(ClosureOptimizer):
    """A :class:`~curvext.optim.base.ClosureOptimizer` with a ``preconditioner``."""

    preconditioner: Preconditioner | Lagged | None

    def _solved(
        self, solver: Callable[..., Solution], A: Any, b: Tensor, point: Point, damping: float, **options: Any
    ) -> tuple[Solution, dict[str, Any]]:
        """The solver's solution, and what the report says of the preconditioner."""
        first, given = point.objective.parameters[0], self.preconditioner
        details: dict[str, Any] = {}
        before, M, kept = point.products, None, None
        if isinstance(given, Lagged):
            kept, details["preconditioner"] = given.updated(self.state[first].get("kept"), point, damping)
            M = given.inverse(kept, point.objective, damping)
        elif given is not None:
            M = given(point, damping)
        if given is not None:
            details["preconditioner_products"] = point.products - before
        solution = solver(A, b, damping=damping, preconditioner=M, **options)
        if solution.reason == "preconditioner not positive definite":
            raise CurvatureError(f"{type(self).__name__}: the preconditioner {given} is not positive definite")
        if isinstance(given, Lagged) and kept is not None:
            self.state[first] = {**self.state[first], "kept": given.used(kept, solution.steps)}
        return solution, {**details, "iterations": solution.steps}

    def _damp(self, damping: float, ratio: float, size: float, steps: int) -> None:
        """The damping of the next step; solves of one step tell of too much of it where no preconditioner helps."""
        short = self.carried.get("short", 0) + 1 if steps <= 1 and self.preconditioner is None else 0
        self.carried["short"] = short
        self.carried["damping"] = self.damping(damping, ratio, step=size, short=short)
