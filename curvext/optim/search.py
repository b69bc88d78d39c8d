"""Along directions until something lower is found, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..solvers import Step, reduction_ratio

if TYPE_CHECKING:
    from .objective import Objective
    from .point import Point

LineSearch = Callable[..., Step]  # Armijo, StrongWolfe, FullStep, or your own


@dataclass(frozen=True)
class Report:
    """What a step did.

    Attributes:
        before, after: the objective, weight decay included, before and after the step.
        moved: whether the parameters changed.
        reason: why the step is what it is, in words.
        products: products with the curvature.
        evaluations: of the closure.
        details: what the optimizer adds: step size, damping, reduction ratio, ...
    """

    before: float
    after: float
    moved: bool
    reason: str
    products: int = 0
    evaluations: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What :meth:`Objective.search` found.

    Attributes:
        name: of the direction, ``None`` if nothing lower was found along any.
        step: what the line search returned; its ``size`` is zero then.
        d: the step taken ``[P]``, ``lr`` and ``size`` in it.
        reason: in words.
        point: there, if the search has made one.
    """

    name: str | None
    step: Step
    d: Tensor
    reason: str
    point: Point | None = None

    def report(self, point: Point, products: int | None = None, **details: Any) -> Report:
        """The report of a step that did this from a point."""
        objective = point.objective
        return Report(
            before=float(point.value),
            after=self.step.value,
            moved=self.name is not None,
            reason=self.reason,
            products=point.products if products is None else products,
            evaluations=objective.evaluations,
            details={"step": self.step.size, "gradient": float(torch.linalg.vector_norm(point.gradient)), **details},
        )

    def ratio(self, point: Point, slope: float, curvature: float) -> float:
        """ρ = (f(θ + d) - f(θ)) / (α ``slope`` + ½ α² ``curvature``), α the size of the step; -inf without a step."""
        if self.name is None:
            return -math.inf
        α = self.step.size
        return reduction_ratio(self.step.value - float(point.value), α * slope + α**2 / 2 * curvature)


class Trials:
    """α -> f(θ + α d), with the slope there for line searches that ask for it; knows the last ``size`` and point."""

    def __init__(self, objective: Objective, d: Tensor, slopes: bool, points: bool):
        self.objective, self.d, self.slopes, self.points = objective, d, slopes, points or slopes
        self.size = 0.0
        self.point: Point | None = None

    def __call__(self, α: float) -> Any:
        self.size, self.point = α, None
        if not self.points:
            return float(self.objective.value(α * self.d))
        self.point = point = self.objective.point(α * self.d, products=False)
        value = float(point.value)
        if not self.slopes:
            return value
        return value, float(point.gradient.dot(self.d)) if math.isfinite(value) else math.nan

    def at(self, α: float) -> Point | None:
        return self.point if self.size == α else None
