"""Estimates of spectra against dense eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import CurvatureError
from curvext.operators import GaussNewton, Hessian
from curvext.spectra import (
    Density,
    density,
    diagonal,
    effective_dimension,
    eigenpairs,
    frobenius_norm,
    hutch_pp,
    log_determinant,
    overlap,
    probes,
    split_traces,
    trace,
    xdiag,
    xtrace,
)

from .matrices import Counting, symmetric

pytestmark = pytest.mark.usefixtures("float64")


def decaying(n=200, sign=1.0):
    """A spectrum as curvature has it: a few large eigenvalues, many small ones."""
    w = 10 * 0.8 ** torch.arange(n, dtype=torch.float64)
    w[1::7] *= sign
    return symmetric(w)


@pytest.fixture(scope="module")
def digits():
    """The model 64-32-10 after a few steps on digits, with its dense Hessian and Gauss-Newton matrices."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(images[:120]) / 16, torch.tensor(labels[:120])
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    data = [(x[:70], y[:70]), (x[70:], y[70:])]
    loss = nn.CrossEntropyLoss()
    H, G = Hessian(model, loss, data, keep=True), GaussNewton(model, loss, data, keep=True)
    return H, G, dense_curvature(model, x, y)


def dense_curvature(model, x, y):
    """H and G of the mean cross entropy from dense Jacobians, independent of any operator."""
    names, values = zip(*((k, p.detach()) for k, p in model.named_parameters()), strict=True)
    shapes = [v.shape for v in values]
    flat = torch.cat([v.flatten() for v in values])

    def outputs(θ):
        parts = θ.split([s.numel() for s in shapes])
        named = {k: p.view(s) for k, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model, named, (x,))

    θ = flat.requires_grad_()
    z = outputs(θ)
    J = rows(z.flatten(), θ).view(*z.shape, -1)  # [N, C, P]
    p = z.detach().softmax(1)
    B = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) / len(x)
    JB = torch.einsum("ncd,ncp->ndp", B, J).flatten(0, 1)
    (gradient,) = torch.autograd.grad(F.cross_entropy(z, y), θ, create_graph=True)
    return rows(gradient, θ), JB.T @ J.flatten(0, 1)


def rows(value, θ):
    """The Jacobian of a vector, by its rows."""
    units = torch.eye(len(value), dtype=θ.dtype).split(300)
    parts = [torch.autograd.grad(value, θ, e, retain_graph=True, is_grads_batched=True)[0] for e in units]
    return torch.cat(parts).detach()


@pytest.mark.parametrize("name", ["H", "G"])
def test_top_twenty_eigenpairs_on_digits(digits, name):
    operator, dense = (digits[0], digits[2][0]) if name == "H" else (digits[1], digits[2][1])
    found = eigenpairs(operator, 20, tolerance=1e-8)
    values, vectors = torch.linalg.eigh(dense)
    assert found.converged
    torch.testing.assert_close(found.values, values.flip(0)[:20], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(
        overlap(found.vectors, vectors.flip(1)[:, :20]).sum(1), torch.ones(20), rtol=1e-6, atol=0
    )
    aligned = overlap(found.vectors, vectors.flip(1)[:, :20]).diagonal()
    torch.testing.assert_close(aligned, torch.ones(20), rtol=0, atol=1e-6)


def test_both_ends_on_digits(digits):
    found = eigenpairs(digits[0], 5, which="both", block=2, tolerance=1e-7)
    values = torch.linalg.eigvalsh(digits[2][0])
    torch.testing.assert_close(found.values, torch.cat([values.flip(0)[:5], values[:5].flip(0)]), rtol=1e-6, atol=1e-9)
    assert found.values[-1] < 0  # a saddle still


def test_residual_of_the_split_on_digits(digits):
    H, G, (dense_H, dense_G) = digits
    split = split_traces(H, G, products=60)
    for estimate, dense in zip(split, (dense_H, dense_G, dense_H - dense_G), strict=True):
        assert abs(estimate.value - dense.trace()) <= 3 * estimate.error
    apart = (split.H.error**2 + split.F.error**2) ** 0.5
    assert split.S.error < apart  # what common probes are for
    S = frobenius_norm(H - G, products=60)
    assert abs(S.value - (dense_H - dense_G).norm()) <= 4 * S.error


def test_relu_networks_have_a_residual_without_diagonal():
    model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.randn(7, 5), torch.randint(0, 3, (7,))
    H, G = (operator(model, F.cross_entropy, (x, y)) for operator in (Hessian, GaussNewton))
    size = float(frobenius_norm(H - G, products=H.shape[0]))
    assert size > 0.1
    assert diagonal(H - G, products=H.shape[0]).value.abs().max() < 1e-10 * size
    assert abs(float(trace(H - G, products=H.shape[0]))) < 1e-10 * size
    split = split_traces(H, G, products=50)
    assert abs(split.S.value) <= 3 * split.S.error
    values = eigenpairs(G, H.shape[0]).values
    assert int((values > 1e-10 * values[0]).sum()) <= 7 * 3


# trace


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["positive", "indefinite"])
def test_trace_within_three_sigma(method, sign):
    A = Counting(decaying(sign=sign))
    for seed in range(5):
        A.products = 0
        found = trace(A, method=method, products=45, seed=seed)
        away = abs(found.value - A.matrix.trace())
        assert away <= (6 if method == "xtrace" else 3) * found.error  # whose terms are not independent
        assert A.products == found.products <= 45


def test_hutchinson_has_its_variance():
    A = decaying(50)
    off = A - A.diagonal().diag()
    expected = math.sqrt(2 * float((off**2).sum()) / 4000)
    found = trace(A, method="hutchinson", products=4000)
    assert abs(found.value - A.trace()) <= 3 * expected
    assert float(found.error) == pytest.approx(expected, rel=0.1)
    assert float(trace(A.diagonal().diag(), method="hutchinson", products=3).error) < 1e-12
    gaussian = trace(A, method="hutchinson", products=4000, kind="gaussian")
    assert float(gaussian.error) == pytest.approx(math.sqrt(2 * float((A**2).sum()) / 4000), rel=0.1)


def test_better_methods_are_better():
    A = decaying()
    errors = {
        method: sum(float((trace(A, method=method, products=60, seed=s).value - A.trace()) ** 2) for s in range(10))
        for method in ("hutchinson", "hutch++", "xtrace")
    }
    assert errors["xtrace"] < errors["hutch++"] / 4 < errors["hutchinson"] / 400


@pytest.mark.parametrize("rank", [0, 1, 5, 9])
@pytest.mark.parametrize("estimate", [xtrace, xdiag])
def test_low_rank_is_exact(rank, estimate):
    L = torch.randn(60, rank)
    A = L @ torch.diag(torch.linspace(-1, 2, rank)) @ L.T if rank else torch.zeros(60, 60)
    found = estimate(A, products=20)
    truth = A.trace() if estimate is xtrace else A.diagonal()
    torch.testing.assert_close(found.value, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 17])
def test_as_many_products_as_unknowns_leave_nothing_to_chance(n):
    A = Counting(symmetric(torch.linspace(-1, 2, n)))
    calls = {xtrace: A.matrix.trace(), hutch_pp: A.matrix.trace(), xdiag: A.matrix.diagonal()}
    for estimate, truth in (calls | {frobenius_norm: A.matrix.norm()}).items():
        A.products = 0
        found = estimate(A, products=n + 2)
        torch.testing.assert_close(found.value, truth)
        assert float(found.error.sum()) == 0 and found.products == A.products == n


def test_few_unknowns():
    A = symmetric(torch.linspace(1, 2, 6))
    terms = torch.stack([xdiag(A, products=5, seed=s).value for s in range(300)])
    assert ((terms.mean(0) - A.diagonal()).abs() <= 4 * terms.std(0) / 300**0.5).all()


def dense_xtrace(A, Z):
    """The definition: for every vector, a basis of the others' images."""
    n, m = Z.shape
    terms = []
    for i in range(m):
        Q = torch.linalg.qr(A @ Z[:, torch.arange(m) != i]).Q
        ε = Z[:, i] - Q @ (Q.T @ Z[:, i])
        terms.append((Q.T @ A @ Q).trace() + (n - m + 1) * (ε @ A @ ε) / (ε @ ε))
    return torch.stack(terms)


def dense_xdiag(A, Z):
    m = Z.shape[1]
    terms = []
    for i in range(m):
        Q = torch.linalg.qr(A @ Z[:, torch.arange(m) != i]).Q
        P = Q @ Q.T
        terms.append((P @ A).diagonal() + Z[:, i] * ((torch.eye(len(A)) - P) @ A @ Z[:, i]))
    return torch.stack(terms)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_xtrace_and_xdiag_are_their_definitions(sign):
    A = decaying(40, sign)
    for found, terms in (
        (xtrace(A, products=16, seed=3), dense_xtrace(A, probes(A, 8, "sphere", 3))),
        (xdiag(A, products=16, seed=3), dense_xdiag(A, probes(A, 8, seed=3))),
    ):
        torch.testing.assert_close(found.value, terms.mean(0))
        torch.testing.assert_close(found.error, terms.std(0) / 8**0.5)
        assert found.products == 16


def test_xtrace_is_unbiased():
    A = symmetric(torch.linspace(-1, 3, 30))
    found = torch.stack([xtrace(A, products=12, seed=s).value for s in range(400)])
    assert abs(found.mean() - A.trace()) <= 3 * found.std() / 20


def test_chunks_do_not_matter():
    A = decaying()
    for method in ("hutchinson", "hutch++", "xtrace"):
        whole, parts = (trace(A, method=method, products=30, chunk=c) for c in (100, 3))
        torch.testing.assert_close(whole.value, parts.value)


@pytest.mark.parametrize("products", [30, 60])
def test_frobenius_norm(products):
    for A in (decaying(), decaying(sign=-1.0), symmetric(torch.randn(100)), torch.zeros(7, 7), torch.eye(4)):
        found = frobenius_norm(A, products=products)
        assert abs(found.value - A.norm()) <= 3.5 * found.error + 1e-10
        assert found.products <= products


# diagonal


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_diagonal(method):
    A = Counting(decaying())
    found = diagonal(A, method=method, products=200)
    standard = (found.value - A.matrix.diagonal()) / found.error
    if method == "hutchinson":
        assert standard.abs().max() < 5 and 0.8 < standard.square().mean() < 1.25
        off = A.matrix - A.matrix.diagonal().diag()
        torch.testing.assert_close(found.error, off.norm(dim=1) / 200**0.5, rtol=0.5, atol=0)
    else:
        assert (found.value - A.matrix.diagonal()).abs().max() < 1e-6
    assert found.products == A.products <= 200


def test_xdiag_beats_hutchinson():
    A = decaying()
    far = [float((diagonal(A, method=m, products=40).value - A.diagonal()).norm()) for m in ("xdiag", "hutchinson")]
    assert far[0] < far[1] / 10


# density


def test_density_integrates_to_one_and_has_the_right_moments():
    A = decaying(300)
    found = density(A, probes=60, steps=20)
    grid = found.grid(4000)
    curve = found(grid)
    assert float(torch.trapezoid(curve.value, grid)) == pytest.approx(1.0, abs=1e-3)
    assert bool((curve.value >= 0).all()) and bool((curve.error >= 0).all())
    for degree in range(1, 5):
        truth = torch.linalg.matrix_power(A, degree).trace() / 300
        estimate = found.moment(degree)
        assert abs(estimate.value - truth) <= 3 * estimate.error
        # of uniform vectors on the sphere
        variance = 2 / 302 * (torch.linalg.matrix_power(A, 2 * degree).trace() / 300 - truth**2)
        torch.testing.assert_close(estimate.error, (variance / 60).sqrt(), rtol=0.4, atol=0)
    assert found.moment(0).value == pytest.approx(1.0) and float(found.moment(0).error) < 1e-12
    assert found.products == 60 * 20


def test_density_moments_of_one_probe_are_exact():
    A = decaying(100, -1.0)
    found = density(A, probes=2, steps=6)
    for i, z in enumerate(probes(A, 2, "sphere").T):
        for degree in (1, 5, 11):
            quadrature = (found.weights[i] * found.nodes[i] ** degree).sum()
            torch.testing.assert_close(quadrature, z @ torch.linalg.matrix_power(A, degree) @ z / 100)


def test_density_shows_the_bulk_and_the_outliers():
    w = torch.cat([torch.linspace(-1, 1, 380), torch.full((20,), 10.0)])
    found = density(symmetric(w), probes=8, steps=50)
    near = [
        float(torch.trapezoid(found(g, 0.2).value, g)) for g in (torch.linspace(-2, 2, 500), torch.linspace(9, 11, 500))
    ]
    assert near == [pytest.approx(0.95, abs=0.02), pytest.approx(0.05, abs=0.02)]
    without = density(symmetric(w), probes=8, steps=50, reorthogonalize="none")  # four vectors of memory
    g = torch.linspace(-2, 11, 300)
    torch.testing.assert_close(without(g, 0.3).value, found(g, 0.3).value, rtol=0, atol=0.02)


def test_density_of_few_eigenvalues_ends_early():
    found = density(symmetric([1.0] * 5 + [2.0] * 15), probes=3, steps=10)
    assert found.nodes.shape == (3, 2)
    torch.testing.assert_close(found.nodes, torch.tensor([1.0, 2.0]).expand(3, 2))
    same = density(2 * torch.eye(5), probes=2, steps=3)
    grid = same.grid()
    assert float(torch.trapezoid(same(grid).value, grid)) == pytest.approx(1.0, abs=1e-3)
    ragged = Density(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]]), 4, 3)
    assert float(ragged.trace(lambda t: t).value) == 8.0


def test_log_determinant_and_effective_dimension():
    A = symmetric(torch.logspace(-3, 1, 200))
    found = log_determinant(A, 0.01, probes=30, steps=60)
    truth = torch.logdet(A + 0.01 * torch.eye(200))
    assert abs(found.value - truth) <= 3 * found.error and found.error < 0.1 * abs(truth)
    found = effective_dimension(A, 0.1, probes=30, steps=60)
    w = torch.linalg.eigvalsh(A)
    assert abs(found.value - (w / (w + 0.1)).sum()) <= 3 * found.error
    with pytest.raises(CurvatureError, match="not positive definite"):
        log_determinant(A - 0.5 * torch.eye(200), 0.1)
    with pytest.raises(CurvatureError, match="not positive definite"):
        effective_dimension(-A, 0.1)


@pytest.mark.parametrize("stop_at", [1, 15, 25, 26, 47])
@pytest.mark.parametrize("how", ["full", "none"])
def test_density_goes_on_where_it_stopped(tmp_path, stop_at, how):
    A, file = decaying(), tmp_path / "density.pt"
    options = {"probes": 3, "steps": 25, "reorthogonalize": how, "checkpoint": file}
    with pytest.raises(KeyboardInterrupt):
        density(Counting(A, stop_at=stop_at), **options)
    again = Counting(A)
    found = density(again, **options)
    whole = density(A, probes=3, steps=25, reorthogonalize=how)
    torch.testing.assert_close(found.nodes, whole.nodes)
    torch.testing.assert_close(found.weights, whole.weights)
    assert again.products <= 75 - (stop_at - 1) + 2 and [p.name for p in tmp_path.iterdir()] == ["density.pt"]
    more = density(again, **{**options, "probes": 5})
    assert more.nodes.shape == (5, 25)
    with pytest.raises(CurvatureError, match="another operator"):
        density(A * 1.001, **options)
    with pytest.raises(CurvatureError, match="another steps"):
        density(A, **{**options, "steps": 20})


# the rest


def test_probes_have_unit_covariance():
    A = torch.eye(7)
    for kind in ("rademacher", "gaussian", "sphere"):
        Z = probes(A, 5000, kind)
        torch.testing.assert_close(Z @ Z.T / 5000, torch.eye(7), rtol=0, atol=0.08)
        assert torch.equal(probes(A, 5, kind, seed=3), probes(A, 5, kind, seed=3))
        assert not torch.equal(probes(A, 5, kind, seed=3), probes(A, 5, kind, seed=4))
    assert set(probes(A, 9).unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(probes(A, 9, "sphere").norm(dim=0), torch.full((9,), 7**0.5))


def test_probes_are_not_the_numbers_of_the_same_seed():
    """As an operator made with ``torch.manual_seed(3)`` may consist of those."""
    A = symmetric(torch.linspace(-1, 1, 50))
    for kind, draw in (
        ("gaussian", torch.randn),
        ("rademacher", lambda n, generator: torch.randint(0, 2, (n,)) * 2 - 1),
    ):
        torch.manual_seed(3)
        same = draw(50, generator=torch.default_generator)
        assert not torch.equal(probes(A, 1, kind, seed=3).squeeze(1), same.to(A))


def test_global_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    A = decaying(30)
    for call in (trace, diagonal, frobenius_norm, density):
        call(A)
    eigenpairs(A, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_float32():
    A = decaying(60).float()
    for found in (trace(A), diagonal(A), frobenius_norm(A), trace(A, method="hutchinson")):
        assert found.value.dtype == torch.float32
    found = trace(A, products=50)
    assert abs(found.value - A.trace()) < 6 * found.error < 0.5
    assert (diagonal(A, products=50).value - A.diagonal()).abs().max() < 0.05


def test_every_long_estimate_shows_its_progress(capsys):
    pytest.importorskip("tqdm")
    A = decaying(80)
    calls = [lambda m=m: trace(A, method=m, progress=True) for m in ("hutchinson", "hutch++", "xtrace")]
    calls += [lambda m=m: diagonal(A, method=m, progress=True) for m in ("hutchinson", "xdiag")]
    calls += [lambda: frobenius_norm(A, progress=True), lambda: density(A, steps=3, progress=True)]
    for call in [*calls, lambda: eigenpairs(A, 2, progress=True)]:
        call()
        assert "it/s" in capsys.readouterr().err


def test_refusals():
    A = torch.eye(5)
    for call in (
        lambda: trace(A, method="magic"),
        lambda: diagonal(A, method="magic"),
        lambda: trace(A, method="hutchinson", products=1),
        lambda: diagonal(A, method="hutchinson", products=1),
        lambda: trace(A, products=3),
        lambda: diagonal(A, products=3),
        lambda: frobenius_norm(A, products=2),
        lambda: trace(A, method="hutchinson", kind="uniform"),
        lambda: trace(torch.ones(2, 3)),
        lambda: density(A, probes=1).moment(1),
    ):
        with pytest.raises(CurvatureError):
            call()


def test_overlap():
    Q = torch.linalg.qr(torch.randn(20, 6)).Q
    torch.testing.assert_close(overlap(Q, Q), torch.eye(6))
    turned = Q @ torch.linalg.qr(torch.randn(6, 6)).Q
    torch.testing.assert_close(overlap(Q, turned).sum(), torch.tensor(6.0))


def test_plots(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    from curvext import plot

    A = decaying(50, -1.0)
    found = density(A, probes=3, steps=10)
    axes = [plot.density(found, label="H"), plot.density(found, grid=torch.linspace(-1, 1, 50), width=0.1)]
    pairs = [eigenpairs(A + 0.1 * i * symmetric(torch.randn(50), i), 4) for i in range(3)]
    axes.append(plot.eigenvalues([0, 10, 20], [p.values for p in pairs]))
    axes.append(plot.overlap([p.vectors for p in pairs], [0, 10, 20]))
    assert len(axes[2].lines) == 4 and axes[2].lines[0].get_ydata()[0] == pytest.approx(float(pairs[0].values[0]))
    shared = torch.as_tensor(axes[3].images[0].get_array().data)
    assert torch.allclose(shared.diagonal().double(), torch.ones(3)) and shared[0, 2] < 1
    given = plt.subplots()[1]
    assert plot.density(found, given) is given
    for i, ax in enumerate(axes):
        ax.figure.savefig(tmp_path / f"{i}.png")
    plt.close("all")
