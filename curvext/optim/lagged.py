"""Approximations that serve several steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .objective import Objective
    from .point import Point
    from .precondition import Approximation


@dataclass(frozen=True)
class Lagged:
    """A preconditioner whose approximation Â is kept from step to step, and computed anew where it no longer serves.

        NewtonCG(model.parameters(), preconditioner=Lagged(KroneckerPreconditioner()))

    Products stay exact and of the current batch; M = (Â + δ I)⁻¹ is made at every step, without any. Where the error
    of Â can be verified (:class:`~curvext.optim.HierarchicalPreconditioner`: 16 products), that is done every
    ``check`` steps, and Â computed anew above ``most`` times the error that it had at first. Where the solver takes
    more than ``growth`` times the steps of its first solve with Â, and has by now lost as many as the products that Â
    took, Â is computed anew in the next step; unless its error is below 1¼ times the first, as then it is not Â that
    has changed, and ``growth`` counts from these steps.

    Â is part of the optimizer's ``state_dict()``; ``report.details["preconditioner"]`` says what became of it, and
    ``report.details["preconditioner_products"]`` what that has cost.

    Args:
        preconditioner: one of :mod:`curvext.optim.precondition`.
        growth, check, most: see above.
    """

    preconditioner: Approximation
    growth: float = 1.5
    check: int = 10
    most: float = 2.0

    def __post_init__(self) -> None:
        if not hasattr(self.preconditioner, "approximate"):
            raise TypeError(f"Lagged: {self.preconditioner} is not made of an approximation, and cannot be kept")
        if self.growth < 1 or self.check < 1 or self.most < 1:
            raise ValueError(f"Lagged: growth={self.growth}, check={self.check} and most={self.most} must be >= 1")

    def updated(self, kept: Mapping[str, Any] | None, point: Point, damping: float) -> tuple[dict[str, Any], str]:
        """What to keep from now on, and what became of what was kept."""
        size = len(point.theta)
        if kept is None or kept["size"] != size:
            return self._new(point, damping), "computed"
        age, slow = kept["age"] + 1, kept["slow"] and kept["lost"] >= kept["cost"]
        drift, why = None, f"{age} steps old"
        if slow or age % self.check == 0:
            drift = self.preconditioner.drift(kept["approximation"], point)
            why = why if drift is None else f"{why}, {drift:.2g} times the first error"
        if (slow and drift is None) or (drift is not None and drift > (1.25 if slow else self.most)):
            return self._new(point, damping), f"computed anew: {why}" + (", slow" if slow else "")
        return {**kept, "age": age, **({"first": None, "lost": 0} if slow else {})}, why

    def _new(self, point: Point, damping: float) -> dict[str, Any]:
        before = point.products
        approximation = self.preconditioner.approximate(point, damping)
        return {"approximation": approximation, "cost": point.products - before, "size": len(point.theta),
                "age": 0, "first": None, "lost": 0, "slow": False}  # fmt: skip

    def used(self, kept: Mapping[str, Any], steps: int) -> dict[str, Any]:
        """The same, after a solve."""
        first = kept["first"] or steps
        return {
            **kept,
            "first": first,
            "lost": kept["lost"] + max(0, steps - first),
            "slow": steps > self.growth * first,
        }

    def inverse(self, kept: Mapping[str, Any], objective: Objective, damping: float) -> Any:
        """M."""
        return self.preconditioner.inverse(kept["approximation"], objective, damping)
