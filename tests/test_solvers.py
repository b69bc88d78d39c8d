"""Solvers against dense linear algebra."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvext import CurvatureError
from curvext.solvers import Martens, block_lanczos, cg, lanczos, lsmr, minres, neumann, saddle_free, saddle_free_series
from curvext.solvers.saddle_free_series import coefficients, shanks

from .matrices import Counting, symmetric

pytestmark = pytest.mark.usefixtures("float64")


# conjugate gradients


@given(n=st.integers(1, 12), columns=st.integers(0, 3), damping=st.floats(0, 2), warm=st.booleans())
def test_cg_solves(n, columns, damping, warm):
    with torch.random.fork_rng():
        torch.manual_seed(n)
        A = Counting(symmetric(torch.rand(n, dtype=torch.float64) + 0.5))
        b = torch.randn((n, columns) if columns else n, dtype=torch.float64)
    x0 = torch.ones_like(b) if warm else None
    found = cg(A, b, damping=damping, tolerance=1e-12, steps=5 * n, x0=x0)
    torch.testing.assert_close(found.x, torch.linalg.solve(A.matrix + damping * torch.eye(n).to(b), b))
    assert found.converged and set([found.reason] if not columns else found.reason) == {"tolerance"}
    assert found.products == A.products and len(found.residuals) == found.steps + 1


def test_cg_residuals_and_values_are_those_of_the_iterates():
    A, b = symmetric(torch.linspace(0.1, 3, 15)), torch.randn(15)
    found = cg(A, b, store=1.0001, steps=9, x0=torch.randn(15))
    for step, x in found.iterates.items():
        torch.testing.assert_close(found.residuals[step], (b - A @ x).norm())
        torch.testing.assert_close(found.values[step], x @ A @ x / 2 - b @ x)


def test_cg_columns_are_independent():
    A, B = symmetric(torch.logspace(-2, 1, 20)), torch.randn(20, 3) * torch.tensor([1.0, 1e-6, 0.0])
    together = cg(A, B, tolerance=1e-8, steps=100)
    for i in range(3):
        alone = cg(A, B[:, i], tolerance=1e-8, steps=100)
        torch.testing.assert_close(together.x[:, i], alone.x)
        assert together.reason[i] == alone.reason


def test_cg_preconditioner_changes_the_iterates():
    scale = torch.logspace(-2, 2, 40)
    A = scale[:, None] * symmetric(torch.linspace(1, 2, 40)) * scale
    b = torch.randn(40)
    M = 1 / A.diagonal()
    plain, diagonal, dense = (cg(A, b, preconditioner=m, tolerance=1e-9, steps=1000) for m in (None, M, M.diag()))
    assert diagonal.steps == dense.steps < plain.steps / 4
    torch.testing.assert_close(diagonal.x, torch.linalg.solve(A, b), rtol=1e-5, atol=1e-5)
    exact = cg(A, b, preconditioner=torch.linalg.inv(A), tolerance=1e-9)
    assert exact.steps <= 2


def test_cg_singular_but_consistent():
    A = symmetric(torch.cat([torch.zeros(5), torch.linspace(1, 4, 15)]))
    b = A @ torch.randn(20)
    found = cg(A, b, tolerance=1e-10)
    assert found.converged
    torch.testing.assert_close(found.x, torch.linalg.lstsq(A, b, driver="gelsd").solution)


def test_cg_singular_and_inconsistent_says_so():
    A = symmetric(torch.cat([torch.zeros(5), torch.linspace(1, 4, 15)]))
    found = cg(A, torch.randn(20), tolerance=1e-10, steps=200)
    assert not found.converged and found.reason == "negative curvature"  # to rounding: the model has no minimum
    flat = found.direction / found.direction.norm()
    assert (A @ flat).norm() < 1e-4


def test_cg_negative_curvature():
    A, b = symmetric(torch.linspace(-1, 3, 30)), torch.randn(30)
    found = cg(A, b, steps=100)
    p = found.direction
    assert found.reason == "negative curvature" and not found.converged
    torch.testing.assert_close(found.curvature, p @ A @ p / (p @ p))
    assert found.curvature < 0 < p @ b
    assert found.x @ A @ found.x / 2 - b @ found.x < 0  # x is the iterate before
    torch.testing.assert_close(found.values[-1], found.values.min())
    going_on = cg(A, b, negative="absolute", steps=20)
    assert going_on.steps == 20 and going_on.curvature <= found.curvature


def test_cg_on_a_saddle_never_ascends():
    H, g = torch.diag(torch.tensor([2.0, -2.0])), torch.tensor([2.0, -2e-3])
    found = cg(H, -g)
    step = found.x if bool(found.x.any()) else found.direction
    assert found.direction is not None and step @ g < 0


def test_cg_stops_as_martens_does():
    A, b = symmetric(torch.logspace(-3, 0, 200)), torch.randn(200)
    for rule in (Martens(), Martens(epsilon=1e-3, window=5), Martens(strict=True)):
        found = cg(A, b, tolerance=0, stop=rule, steps=200)
        φ = cg(A, b, tolerance=0, steps=200).values.tolist()
        for i in range(1, 201):
            k = max(rule.window, math.ceil(i / 10))
            gain = (φ[i] - φ[i - k]) / φ[i] if i > k else math.inf
            if gain < rule.epsilon * (1 if rule.strict else k):
                break
        assert found.reason == "progress" and found.converged and found.steps == i < 200
    assert cg(A, b, tolerance=0, stop=Martens()).steps < cg(A, b, tolerance=0, stop=Martens(strict=True)).steps


def test_cg_stores_martens_grid():
    found = cg(symmetric(torch.logspace(-3, 0, 60)), torch.randn(60), tolerance=0, steps=25, store=1.3)
    grid = {math.ceil(1.3**j) - 1 for j in range(20)}
    assert sorted(found.iterates) == sorted({s for s in grid if s <= 25} | {25})
    torch.testing.assert_close(found.iterates[25], found.x)


def test_cg_refuses():
    A, b = symmetric([1.0, 2.0, 3.0]), torch.ones(3)
    assert "preconditioner" in cg(A, b, preconditioner=-torch.ones(3)).reason
    with pytest.raises(CurvatureError, match="shape"):
        cg(A, torch.ones(4))
    with pytest.raises(CurvatureError, match="symmetric"):
        cg(torch.ones(3, 2), b)
    with pytest.raises(CurvatureError, match="preconditioner of shape"):
        cg(A, b, preconditioner=torch.ones(4))
    with pytest.raises(CurvatureError, match="floating"):
        cg(A, torch.ones(3, dtype=torch.long))
    with pytest.raises(CurvatureError, match="negative="):
        cg(A, b, negative="ignore")
    assert cg(A * math.nan, b).reason == "not finite"


# MINRES, LSMR, Neumann


@pytest.mark.parametrize("diagonal", [False, True], ids=["plain", "preconditioned"])
def test_minres_indefinite(diagonal):
    A, b = symmetric(torch.linspace(-2, 3, 31)), torch.randn(31)
    M = torch.rand(31) + 0.5 if diagonal else None
    found = minres(A, b, damping=0.03, preconditioner=M, tolerance=1e-12)
    assert found.converged and bool((found.residuals.diff() <= 0).all())
    torch.testing.assert_close(found.x, torch.linalg.solve(A + 0.03 * torch.eye(31), b))


def test_minres_residual_is_smallest_on_the_krylov_space():
    A, b = symmetric(torch.linspace(-2, 3, 31)), torch.randn(31)
    found = minres(A, b, steps=6, tolerance=0)
    powers = torch.stack([torch.linalg.matrix_power(A, i) @ b for i in range(6)], 1)
    best = torch.linalg.lstsq(A @ powers, b).solution
    torch.testing.assert_close(found.residuals[6], (b - A @ powers @ best).norm())
    torch.testing.assert_close(found.residuals[6], (b - A @ found.x).norm())
    assert found.reason == "steps" and found.products == 6


def test_minres_singular():
    A = symmetric(torch.cat([torch.zeros(4), torch.linspace(-2, 3, 26)]))
    inside = A @ torch.randn(30)
    found = minres(A, inside, tolerance=1e-10)
    assert found.converged and (A @ found.x - inside).norm() <= 1e-9 * inside.norm()
    outside = torch.randn(30)
    found = minres(A, outside, tolerance=1e-9)
    assert not found.converged and found.reason == "least squares"
    assert (A @ (A @ found.x - outside)).norm() < 1e-6
    assert minres(A, torch.zeros(30)).converged


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("diagonal", [True, False])
def test_minres_stops_at_negative_curvature(diagonal, damping):
    A, b = symmetric(torch.cat([torch.tensor([-0.5]), torch.linspace(0.5, 3, 40)])), torch.randn(41)
    damped, M = A + damping * torch.eye(41), torch.rand(41) + 0.5 if diagonal else torch.ones(41)
    found = minres(A, b, damping=damping, preconditioner=M, negative="stop")
    assert found.reason == "negative curvature" and found.products == found.steps + 1 > 2 and not found.converged
    d = found.direction
    r = b - damped @ found.x
    scale = (M * r) @ damped @ (M * r) / (r @ (M * r))
    assert scale <= 0 < d @ b
    torch.testing.assert_close(d, M * r / -scale)
    for steps in range(1, found.steps + 1):  # not earlier
        before = minres(A, b, damping=damping, preconditioner=M, steps=steps, tolerance=0)
        assert before.x @ damped @ before.x > 0 and before.x @ b > 0
        if steps < found.steps:
            r = M * (b - damped @ before.x)
            assert r @ damped @ r > 0
    torch.testing.assert_close(found.x, before.x)
    assert minres(symmetric(torch.linspace(0.5, 3, 41)), b, negative="stop").converged
    first = minres(-2 * torch.eye(3), torch.ones(3), negative="stop")
    assert first.products == 1 and not first.x.any()
    torch.testing.assert_close(first.direction, torch.ones(3) / 2)
    with pytest.raises(CurvatureError, match="'stop'"):
        minres(A, b, negative="absolute")


def test_minres_refuses_an_indefinite_preconditioner():
    with pytest.raises(CurvatureError, match="positive definite"):
        minres(symmetric([1.0, 2.0]), torch.ones(2), preconditioner=-torch.ones(2))


@given(m=st.integers(1, 12), n=st.integers(1, 12), damping=st.sampled_from([0.0, 0.3, 2.0]))
def test_lsmr_least_squares(m, n, damping):
    with torch.random.fork_rng():
        torch.manual_seed(m * n)
        A, b = torch.randn(m, n, dtype=torch.float64), torch.randn(m, dtype=torch.float64)
    found = lsmr(A, b, damping=damping, tolerance=1e-13)
    rows = torch.cat([A, damping * torch.eye(n).to(A)]) if damping else A
    right = torch.cat([b, torch.zeros(n).to(b)]) if damping else b
    best = torch.linalg.lstsq(rows, right, driver="gelsd").solution  # the shortest
    torch.testing.assert_close(found.x, best, rtol=1e-6, atol=1e-6)
    normal = (A.T @ (b - A @ found.x) - damping**2 * found.x).norm()
    assert found.converged and normal < 1e-8
    assert bool((found.residuals.diff() <= 1e-12).all())


def test_lsmr_residuals_are_those_of_the_normal_equations():
    A, b = torch.randn(30, 20), torch.randn(30)
    for steps in (1, 4, 9):
        found = lsmr(A, b, damping=0.5, steps=steps, tolerance=0)
        torch.testing.assert_close(found.residuals[-1], (A.T @ (b - A @ found.x) - 0.25 * found.x).norm())
        assert found.products == 2 * steps + 1


def test_neumann_is_the_partial_sum():
    A, b = symmetric(torch.linspace(0.2, 1.8, 10)), torch.randn(10, 2)
    M = torch.rand(10) / 2 + 0.5
    found = neumann(A, b, scale=0.9, damping=0.1, preconditioner=M, steps=7)
    step = torch.eye(10) - 0.9 * M[:, None] * (A + 0.1 * torch.eye(10))
    terms = [torch.linalg.matrix_power(step, i) @ (0.9 * M[:, None] * b) for i in range(7)]
    torch.testing.assert_close(found.x, sum(terms))
    assert found.products == 12 and found.reason == "steps" and not found.converged


def test_neumann_converges_and_diverges():
    A, b = symmetric(torch.linspace(0.2, 1.8, 10)), torch.randn(10)
    found = neumann(A, b, tolerance=1e-8, steps=1000)
    assert found.converged
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-6)
    assert neumann(2 * A, b, tolerance=1e-8, steps=1000).reason == "diverged"
    assert neumann(-A, b, steps=1000).reason == "diverged"


# all of them


def test_float32_stays_float32():
    A, b = symmetric(torch.linspace(-1, 2, 50)).float(), torch.randn(50, dtype=torch.float32)
    solved = [minres(A, b), saddle_free(A, b, damping=0.1), saddle_free_series(A, b, damping=0.1), lsmr(A, b), cg(A, b)]
    assert {s.x.dtype for s in solved} | {s.residuals.dtype for s in solved} == {torch.float32}
    found = block_lanczos(A, b, 3, tolerance=1e-4)
    assert {found.values.dtype, found.vectors.dtype, found.residuals.dtype} == {torch.float32}
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(A).flip(0)[:3])


def test_nothing_keeps_a_graph():
    A, b = symmetric(torch.linspace(1, 2, 30)).requires_grad_(), torch.randn(30, requires_grad=True)
    calls = [cg, minres, lsmr, neumann, lambda *a: saddle_free(*a, damping=0.1, steps=5)]
    calls += [lambda *a: saddle_free(*a, damping=0.1, two_passes=True), lambda *a: saddle_free_series(*a, damping=0.1)]
    calls += [lambda *a: cg(*a, x0=b, preconditioner=b.abs()), lambda *a: cg(*a, preconditioner=A)]
    for call in calls:
        found = call(A, b)
        assert not (found.x.requires_grad or found.residuals.requires_grad)
    assert not lanczos(A, b, steps=3).basis.requires_grad
    assert not block_lanczos(A, b, 2).vectors.requires_grad


def test_products_of_the_wrong_shape_are_refused():
    class Column:
        shape = (3, 3)

        def __matmul__(self, v):
            return v[:, None]

    for call in (cg, minres, lambda A, b: lanczos(A, b, steps=2)):
        with pytest.raises(CurvatureError, match=r"gave one of shape \(3, 1\)"):
            call(Column(), torch.ones(3))


# saddle-free Newton


def curvature_like(seed=0):
    """Ten outliers between 1 and 20, and a bulk around zero of standard deviation 0.05."""
    generator = torch.Generator().manual_seed(seed)
    bulk = 0.05 * torch.randn(490, generator=generator, dtype=torch.float64)
    A = symmetric(torch.cat([torch.linspace(1, 20, 10, dtype=torch.float64), bulk]))
    return A, torch.randn(500, generator=generator, dtype=torch.float64)


def exact(A, g, damping):
    w, Q = torch.linalg.eigh(A)
    return Q @ ((Q.T @ g) / (w.abs() + damping))


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def test_saddle_free_reaches_the_step_with_twenty_products():
    A, g = curvature_like()
    truth = exact(A, g, 0.1)
    found = saddle_free(A, g, damping=0.1, steps=20)
    assert found.products == 20 and cosine(found.x, truth) >= 0.99
    assert (found.x - truth).norm() <= 0.06 * truth.norm()
    series = saddle_free_series(A, g, damping=0.1, terms=40, order=4, scale=390.0)
    assert series.products == 78 and not series.converged and found.converged
    assert (series.x - truth).norm() > 0.8 * truth.norm() and cosine(series.x, truth) < cosine(found.x, truth)


@pytest.mark.parametrize("two_passes", [False, True])
def test_saddle_free_of_n_steps_is_exact(two_passes):
    A, g = symmetric(torch.randn(20)), torch.randn(20)
    found = saddle_free(A, g, damping=0.3, steps=20, two_passes=two_passes)
    torch.testing.assert_close(found.x, exact(A, g, 0.3), rtol=1e-4 if two_passes else 1e-9, atol=1e-5)
    assert found.products == (39 if two_passes else 20)
    scaled = saddle_free(-3.0 * torch.eye(20), g, damping=0.5)
    torch.testing.assert_close(scaled.x, g / 3.5)
    assert scaled.reason == "invariant" and scaled.products == 1


def test_saddle_free_residual_is_the_residual_for_a_positive_operator():
    A, g = symmetric(torch.linspace(0.1, 2, 50)), torch.randn(50)
    found = saddle_free(A, g, damping=0.1, steps=9)
    torch.testing.assert_close(found.residuals[-1], (A @ found.x + 0.1 * found.x - g).norm())


def test_saddle_free_knows_its_quadratic_model_and_the_saddle():
    A, g = symmetric(torch.linspace(-1, 2, 50)), torch.randn(50)
    found = saddle_free(A, g, damping=0.1, steps=15)
    step, krylov = found.x, found.krylov
    torch.testing.assert_close(torch.tensor(krylov.quadratic(lambda t: 1 / (t.abs() + 0.1))), g @ step)
    torch.testing.assert_close(torch.tensor(krylov.quadratic(lambda t: t / (t.abs() + 0.1) ** 2)), step @ A @ step)
    torch.testing.assert_close(found.direction @ A @ found.direction, found.curvature)
    assert found.curvature < -0.9
    assert saddle_free(A @ A, g, damping=0.1).direction is None
    with pytest.raises(CurvatureError, match="damping"):
        saddle_free(A, g, damping=0.0)


@pytest.mark.parametrize("delta", [0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0, 1.001, 1.3, 1.41, 1.42, 2.0, 10.0])
def test_series_coefficients(delta):
    with mpmath.workdps(60):
        truth = mpmath.taylor(lambda x: 1 / (mpmath.sqrt(1 - x) + mpmath.mpf(delta)), 0, 60)
        errors = [abs(mpmath.mpf(c) / t - 1) for c, t in zip(coefficients(delta, 60), truth, strict=False)]
    assert max(errors) < 1e-12


def test_series_converges_to_the_saddle_free_step():
    A, g = symmetric(torch.cat([torch.linspace(-2, -0.4, 10), torch.linspace(0.4, 3, 10)])), torch.randn(20)
    found = saddle_free_series(A, g, damping=0.5, terms=1500, order=0, scale=5.5, adapt=False)
    torch.testing.assert_close(found.x, exact(A, g, 0.5), rtol=0, atol=1e-8)
    assert found.converged and found.products == 2998
    few, more = (
        saddle_free_series(A, g, damping=0.5, terms=25, order=k, scale=9.0, adapt=False).x - exact(A, g, 0.5)
        for k in (0, 4)
    )
    assert more.norm() < few.norm() / 5  # what Shanks is for


@pytest.mark.parametrize("part, converges", [(0.49, False), (0.51, True)])
def test_series_converges_if_scale_exceeds_half_the_square(part, converges):
    A, g = symmetric(torch.linspace(-2, 2, 20)), torch.randn(20)
    options = {"damping": 0.5, "order": 0, "scale": part * 4, "adapt": False}
    short, long = (saddle_free_series(A, g, terms=terms, **options) for terms in (400, 800))
    errors = [float((s.x - exact(A, g, 0.5)).norm()) for s in (short, long)]
    assert (errors[1] < errors[0] < 0.02) if converges else (errors[1] > 100 * errors[0])
    assert (long.reason == "diverged") != converges and long.converged == converges


def test_series_scale_rule():
    A, g = curvature_like()
    bound = float((A @ (A @ g)).norm() / g.norm())
    options = {"damping": 1.0, "terms": 5}
    assert saddle_free_series(A, g, scale=1.0, **options).scale >= bound
    assert saddle_free_series(A, g, scale=500.0, **options).scale == 500.0
    assert saddle_free_series(A, g, scale=500.0, decay=0.9, **options).scale == 450.0
    failed = saddle_free_series(A, g, scale=1.0, damping=1.0, terms=20, order=0)
    assert failed.reason == "diverged" and not failed.converged
    again = saddle_free_series(A, g, scale=failed.scale, damping=1.0, terms=20, order=0)
    assert again.reason != "diverged" and failed.scale <= 400.0 + 1e-9
    one = saddle_free_series(A, g, damping=2.0, terms=1, order=0, scale=4.0)
    torch.testing.assert_close(one.x, g / 4)
    assert one.products == 0 and saddle_free_series(A, 0 * g, damping=1.0).converged
    with pytest.raises(CurvatureError, match="terms > 2 order"):
        saddle_free_series(A, g, damping=1.0, terms=4, order=2)


def test_shanks_sums_geometric_sequences():
    limit, parts = torch.randn(8), torch.randn(2, 8)
    sums = [limit + 0.9**m * parts[0] + (-0.5) ** m * parts[1] for m in range(5)]
    torch.testing.assert_close(shanks(sums), limit)
    torch.testing.assert_close(shanks([limit] * 3), limit)  # nothing left to extrapolate
