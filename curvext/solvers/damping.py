"""How strong the damping is: the rules of Levenberg and Marquardt."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import CurvatureError


def reduction_ratio(actual: float, predicted: float) -> float:
    """ρ = (f(θ + s) - f(θ)) / (q(s) - q(0)); -inf where the model predicted no decrease, or the new f is no number."""
    if not predicted < 0 or math.isnan(actual):
        return -math.inf
    return actual / predicted


@dataclass(frozen=True)
class Constant:
    """The same damping at every step."""

    first: float = 1e-3

    def __call__(self, damping: float, ratio: float, *, step: float = 1.0, short: int = 0) -> float:
        """``damping`` itself."""
        return damping


@dataclass(frozen=True)
class LevenbergMarquardt:
    """λ falls where the quadratic model predicted the decrease, and rises where it did not.

    ρ > ``high``: λ ``drop``; ρ < ``low``: λ ``boost``; both within ``least`` and ``most``. ρ is measured with or
    without damping in the model:

    ===================================  =======  =========  =========  ========  =====  =====
    source                               model    low, high  boost      drop      least  first
    ===================================  =======  =========  =========  ========  =====  =====
    Martens 2010                         with     1/4, 3/4   3/2        2/3       0      1
    Wang, Tan, Lin 2020                  without  1/4, 3/4   3/2        2/3       0      1
    Oldewage and others 2023 (series)    with     1/4, 3/4   1 / 0.9    0.9       1e-8   1
    saddle-free Newton by Lanczos        without  1/4, 3/4   3          1/3       1e-8   1e-2
    CurveBall 2018, every five steps     with     1/2, 3/2   0.999⁻⁵    0.999⁵    0      1
    ===================================  =======  =========  =========  ========  =====  =====

    λ can wind up: where the loss has kinks that the model does not see (ReLU), line searches shorten every step, ρ
    stays small, and λ grows until CG ends after one product. Against that: ``most``; ``guard``, with which a λ does not
    rise after a step that the line search has shortened; and λ = ``first`` again after two solves in a row that ended
    at one product.

    Args:
        first: where to start, and to start again.
        low, high, boost, drop, least, most: see above.
        guard: whether to guard against wind-up.
    """

    first: float = 1.0
    low: float = 0.25
    high: float = 0.75
    boost: float = 1.5
    drop: float = 2 / 3
    least: float = 0.0
    most: float = math.inf
    guard: bool = True

    def __post_init__(self) -> None:
        if not (self.low <= self.high and 0 < self.drop <= 1 <= self.boost and 0 <= self.least <= self.most):
            raise CurvatureError(f"low <= high, drop <= 1 <= boost and least <= most are needed: {self}")

    def __call__(self, damping: float, ratio: float, *, step: float = 1.0, short: int = 0) -> float:
        """The next λ.

        Args:
            damping: λ of the step just taken.
            ratio: its ρ (:func:`reduction_ratio`).
            step: α that the line search chose, 1 without one.
            short: how many solves in a row, the last one included, ended after one product.
        """
        if self.guard and short >= 2 and damping > self.first:
            return self.first
        if ratio > self.high:
            damping *= self.drop
        elif not ratio >= self.low and not (self.guard and 0 < step < 1):
            damping *= self.boost
        return min(max(damping, self.least), self.most)
