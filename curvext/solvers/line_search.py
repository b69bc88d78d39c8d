"""How far to go along a direction: Armijo's rule, the strong Wolfe conditions, and back through the iterates of CG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import CurvatureError


@dataclass(frozen=True)
class Step:
    """What a line search found along f(θ + α p).

    Attributes:
        size: α, zero where nothing was found.
        value: f there.
        evaluations: of f.
        accepted: whether the conditions hold.
    """

    size: float
    value: float
    evaluations: int
    accepted: bool


def _descent(value: float, slope: float) -> None:
    if not slope < 0 or not math.isfinite(value):
        raise CurvatureError(
            f"line search: value {value} and slope gᵀp = {slope}, where a finite value and a direction of descent are "
            "needed; go along -g instead"
        )


@dataclass(frozen=True)
class FullStep:
    """No search: α = ``size`` if f is lower there, else nothing, which leaves it to the damping to rise.

    Args:
        size: α.
        always: take the step wherever f is finite.
    """

    size: float = 1.0
    always: bool = False

    def __call__(self, f: Callable[[float], float], value: float, slope: float) -> Step:
        """The step along α -> f(α), given f(0) = ``value``."""
        _descent(value, slope)
        here = f(self.size)
        good = here < value or (self.always and math.isfinite(here))
        return Step(self.size if good else 0.0, here if good else value, 1, good)


@dataclass(frozen=True)
class Armijo:
    """Backtracking: α = ``first``, ``first`` ρ, ... until  f(θ + α p) <= f(θ) + c α gᵀp.

    Args:
        c: the fraction of the slope that has to be gained; Martens takes 1e-2.
        shrink: ρ; Martens takes 0.8.
        first: the first α.
        trials: evaluations at most; Martens takes 20.

    Source: Nocedal and Wright, Numerical Optimization, algorithm 3.1.
    """

    c: float = 1e-4
    shrink: float = 0.5
    first: float = 1.0
    trials: int = 30

    def __call__(self, f: Callable[[float], float], value: float, slope: float) -> Step:
        """The step along α -> f(α), given f(0) = ``value`` and f'(0) = ``slope`` < 0; NaN counts as too high."""
        _descent(value, slope)
        size = self.first
        for trial in range(1, self.trials + 1):
            here = f(size)
            if here <= value + self.c * size * slope:
                return Step(size, here, trial, True)
            size *= self.shrink
        return Step(0.0, value, self.trials, False)


@dataclass(frozen=True)
class StrongWolfe:
    """An α with  f(α) <= f(0) + c₁ α f'(0)  and  |f'(α)| <= c₂ |f'(0)|, so that sᵀy > 0 for quasi-Newton pairs.

    Args:
        c1, c2: 0 < c1 < c2 < 1.
        first: the first α.
        longest: α at most.
        trials: evaluations at most; then the best point that satisfies the first condition is returned, not accepted.

    Source: Nocedal and Wright, Numerical Optimization, algorithms 3.5 and 3.6, with safeguarded cubic interpolation.
    """

    c1: float = 1e-4
    c2: float = 0.9
    first: float = 1.0
    longest: float = 1e10
    trials: int = 25
    slopes: ClassVar[bool] = True  # asks for f'(α) as well

    def __call__(self, f: Callable[[float], tuple[float, float]], value: float, slope: float) -> Step:
        """The step along α -> (f(α), f'(α)), given f(0) = ``value`` and f'(0) = ``slope`` < 0."""
        _descent(value, slope)
        low, high = _Point(0.0, value, slope), None
        start, size = low, self.first
        for trial in range(1, self.trials + 1):
            here = _Point(size, *f(size))
            if not self._lower(here, start) or not here.value < low.value:
                high = here
            elif abs(here.slope) <= -self.c2 * slope:
                return Step(here.size, here.value, trial, True)
            elif high is None and here.slope < 0:
                low = here
            else:
                if high is None or here.slope * (high.size - low.size) >= 0:
                    high = low
                low = here
            size = min(2 * here.size, self.longest) if high is None else _between(low, high)
            if size == here.size:
                break
        return Step(low.size, low.value, trial, False)

    def _lower(self, here: _Point, start: _Point) -> bool:
        return here.value <= start.value + self.c1 * here.size * start.slope


@dataclass(frozen=True)
class _Point:
    size: float
    value: float
    slope: float


def _between(a: _Point, b: _Point) -> float:
    """The minimiser of the cubic through both, kept off the ends by a tenth; the middle where there is none."""
    middle, width = (a.size + b.size) / 2, abs(b.size - a.size)
    if not all(map(math.isfinite, (a.value, a.slope, b.value, b.slope))):
        return middle
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.size - b.size)
    unit = max(abs(d1), abs(a.slope), abs(b.slope))  # the squares would overflow
    square = (d1 / unit) ** 2 - (a.slope / unit) * (b.slope / unit) if unit else -1.0
    if square < 0:
        return middle
    d2 = math.copysign(unit * math.sqrt(square), b.size - a.size)
    if b.slope - a.slope + 2 * d2 == 0:
        return middle
    size = b.size - (b.size - a.size) * (b.slope + d2 - d1) / (b.slope - a.slope + 2 * d2)
    left = min(a.size, b.size) + 0.1 * width
    return min(max(size, left), left + 0.8 * width)


def backtrack(f: Callable[[Tensor], float], iterates: Mapping[int, Tensor]) -> tuple[Tensor, float, int]:
    """The stored iterate of CG at which to stop: from the last one back, as long as f decreases.

    Source: Martens 2010, section 4.6.

    Returns:
        The iterate, its f, and how many times f was evaluated.
    """
    latest_first = [iterates[step] for step in sorted(iterates, reverse=True)]
    best, value = latest_first[0], f(latest_first[0])
    for evaluations, x in enumerate(latest_first[1:], 2):
        here = f(x)
        if not here < value and not math.isnan(value):
            return best, value, evaluations
        best, value = x, here
    return best, value, len(latest_first)
