"""Line searches and damping rules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvext import CurvatureError
from curvext.solvers import Armijo, Constant, LevenbergMarquardt, StrongWolfe, backtrack, cg, reduction_ratio

FUNCTIONS = {
    "quadratic": (lambda a: (a - 3) ** 2, lambda a: 2 * (a - 3)),
    "quartic": (lambda a: a**4 - 2 * a, lambda a: 4 * a**3 - 2),
    "wavy": (lambda a: -0.3 * math.sin(5 * a) - a + 0.1 * a**2, lambda a: -1.5 * math.cos(5 * a) - 1 + 0.2 * a),
    "steep": (lambda a: math.exp(9 * a) - 40 * a, lambda a: 9 * math.exp(9 * a) - 40),
    "flat": (lambda a: -a / (a**2 + 2), lambda a: (a**2 - 2) / (a**2 + 2) ** 2),  # Moré and Thuente's first
    "kink": (lambda a: abs(a - 0.7), lambda a: 1.0 if a > 0.7 else -1.0),
}
SMOOTH = {name: pair for name, pair in FUNCTIONS.items() if name != "kink"}


@pytest.mark.parametrize("name", SMOOTH)
@given(first=st.floats(1e-3, 1e3), c2=st.sampled_from([0.9, 0.1]))
def test_strong_wolfe_holds(name, first, c2):
    f, slope = SMOOTH[name]

    def both(a):
        return (f(a), slope(a)) if a < 70 else (math.inf, math.nan)

    step = StrongWolfe(first=first, c2=c2, trials=60)(both, f(0.0), slope(0.0))
    assert step.accepted
    assert step.value == f(step.size) <= f(0.0) + 1e-4 * step.size * slope(0.0)
    assert abs(slope(step.size)) <= c2 * abs(slope(0.0))


def test_strong_wolfe_takes_a_good_first_step_and_interpolates():
    f, slope = FUNCTIONS["quadratic"]
    assert StrongWolfe(first=3.0)(lambda a: (f(a), slope(a)), 9.0, -6.0).evaluations == 1
    found = StrongWolfe(first=100.0, c2=0.1)(lambda a: (f(a), slope(a)), 9.0, -6.0)
    assert found.accepted and found.evaluations <= 4


def test_strong_wolfe_gives_up_with_what_it_has():
    linear = StrongWolfe(longest=8.0)(lambda a: (-a, -1.0), 0.0, -1.0)  # unbounded below
    assert not linear.accepted and linear.size == 8.0 and linear.value == -8.0
    f, slope = FUNCTIONS["kink"]
    kink = StrongWolfe(c2=0.5)(lambda a: (f(a), slope(a)), 0.7, -1.0)
    assert not kink.accepted and kink.value < 0.7
    nothing = StrongWolfe(trials=5)(lambda a: (math.nan, math.nan), 0.0, -1.0)
    assert not nothing.accepted and nothing.size == 0.0


@given(first=st.floats(1e-2, 1e2), shrink=st.floats(0.1, 0.9))
def test_armijo_is_the_first_that_holds(first, shrink):
    f, slope = FUNCTIONS["steep"][0], FUNCTIONS["steep"][1](0.0)
    rule = Armijo(first=first, shrink=shrink, trials=200)
    step = rule(lambda a: f(a) if a < 70 else math.inf, f(0.0), slope)
    assert step.accepted and step.value <= f(0.0) + 1e-4 * step.size * slope
    sizes = [first]
    while len(sizes) < step.evaluations:
        sizes.append(sizes[-1] * shrink)
    assert sizes[-1] == step.size
    assert all(a >= 70 or f(a) > f(0.0) + 1e-4 * a * slope for a in sizes[:-1])


def test_armijo_backs_off_from_nan_and_gives_up():
    assert Armijo()(lambda a: math.nan if a > 0.3 else -a, 0.0, -1.0).size == 0.25
    step = Armijo(trials=7)(lambda a: 1.0, 0.0, -1.0)
    assert (step.size, step.value, step.evaluations, step.accepted) == (0.0, 0.0, 7, False)


@pytest.mark.parametrize("search", [Armijo(), StrongWolfe()], ids=["armijo", "wolfe"])
@pytest.mark.parametrize("value, slope", [(1.0, 0.0), (1.0, 2.0), (math.nan, -1.0), (1.0, math.nan)])
def test_searches_refuse_directions_of_ascent(search, value, slope):
    with pytest.raises(CurvatureError, match="direction of descent"):
        search(lambda a: (0.0, 0.0), value, slope)


def test_backtracking_through_the_iterates_of_cg():
    A = torch.diag(torch.logspace(-4, 0, 50, dtype=torch.float64))
    b = torch.ones(50, dtype=torch.float64)
    solution = cg(A, b, tolerance=0, steps=40, store=1.3)
    steps = sorted(solution.iterates)
    for best in (0, len(steps) // 2, len(steps) - 1):
        target = solution.iterates[steps[best]]
        seen = []

        def f(x, target=target, seen=seen):
            seen.append(x)
            return float((x - target).norm())

        x, value, evaluations = backtrack(f, solution.iterates)
        assert x is target and value == 0.0
        assert evaluations == len(seen) == min(len(steps) - best + 1, len(steps))
    x, _, _ = backtrack(lambda x: math.nan if x is solution.iterates[40] else 1.0, solution.iterates)
    assert x is solution.iterates[steps[-2]]  # a value that is no number is never the best


def test_reduction_ratio():
    assert reduction_ratio(-1.0, -2.0) == 0.5
    assert reduction_ratio(1.0, -2.0) == -0.5
    assert reduction_ratio(-1.0, 0.0) == reduction_ratio(-1.0, 1.0) == reduction_ratio(math.nan, -1.0) == -math.inf
    assert reduction_ratio(math.inf, -1.0) == -math.inf


def test_levenberg_marquardt():
    rule = LevenbergMarquardt()
    assert rule(1.0, 0.8) == pytest.approx(2 / 3)
    assert rule(1.0, 0.5) == rule(1.0, 0.25) == rule(1.0, 0.75) == 1.0
    assert rule(1.0, 0.2) == rule(1.0, -math.inf) == rule(1.0, math.nan) == 1.5
    bounded = LevenbergMarquardt(least=0.9, most=1.1)
    assert (bounded(1.0, 1.0), bounded(1.0, 0.0)) == (0.9, 1.1)
    assert Constant()(0.3, -1.0) == 0.3
    with pytest.raises(CurvatureError, match="drop"):
        LevenbergMarquardt(drop=1.5)


def test_damping_does_not_wind_up():
    """Line searches that shorten every step, as on kinks, with a small ratio each time."""
    guarded, plain = LevenbergMarquardt(), LevenbergMarquardt(guard=False)
    λ = [0.02, 0.02]
    for _ in range(100):
        λ = [rule(x, 0.1, step=0.25) for rule, x in zip((guarded, plain), λ, strict=True)]
    assert λ[0] == 0.02 and λ[1] > 1e15
    assert guarded(0.02, 0.1, step=1.0) == pytest.approx(0.03)  # the full step was taken, and the model was wrong
    assert guarded(0.02, 0.9, step=0.25) == pytest.approx(0.02 * 2 / 3)
    assert guarded(50.0, 0.1, short=2) == 1.0 and guarded(50.0, 0.1, short=1) == 75.0
    assert plain(50.0, 0.1, short=2) == 75.0
    assert guarded(0.1, 0.5, short=2) == 0.1  # nothing was wound up
    assert guarded(0.02, -math.inf, step=0.0) == pytest.approx(0.03)  # no step at all
