"""Predictions from the curvature at a minimum are what happens when the data change."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pytest import approx, fixture, importorskip, mark, raises
from torch import Tensor

from curvext import CurvatureError
from curvext.operators import Hessian, HierarchicalOperator
from curvext.posterior import Sensitivity

pytestmark = mark.usefixtures("float64")
SAMPLES, PENALTY = 150, 1e-2


def data() -> tuple[Tensor, Tensor]:
    digits = importorskip("sklearn.datasets").load_digits()
    return torch.tensor(digits.data) / 16, torch.tensor(digits.target)


def fitted(x: Tensor, y: Tensor, n: int, start: Tensor | None = None, penalty: float = PENALTY) -> Tensor:
    """Weights [10, 64] of penalised logistic regression, by Newton's method; ``n`` is what sums are divided by."""
    w = torch.zeros(640) if start is None else start.clone()
    for _ in range(12 if start is None else 5):
        p = (x @ w.view(10, 64).T).softmax(1)
        gradient = ((p - F.one_hot(y, 10)).T @ x).flatten() / n + penalty * w
        b = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        h = torch.einsum("nab,ni,nj->aibj", b, x, x).reshape(640, 640) / n
        w = w - torch.linalg.solve(h + penalty * torch.eye(640), gradient)
    return w


@fixture(scope="module")
def problem():
    torch.set_default_dtype(torch.float64)
    x, y = data()
    train, test = (x[:SAMPLES], y[:SAMPLES]), (x[SAMPLES : SAMPLES + 20], y[SAMPLES : SAMPLES + 20])
    w = fitted(*train, SAMPLES)
    torch.set_default_dtype(torch.float32)
    return train, test, w


def model(w: Tensor) -> torch.nn.Module:
    linear = torch.nn.Linear(64, 10, bias=False)
    with torch.no_grad():
        linear.weight.copy_(w.view(10, 64))
    return linear


def gradients(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    p = (x @ w.view(10, 64).T).softmax(1) - F.one_hot(y, 10)
    return torch.einsum("na,ni->ain", p, x).reshape(640, len(x))


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_leaving_samples_out(problem):
    (x, y), (tx, ty), w = problem
    h = Hessian(model(w), F.cross_entropy, (x, y))
    sensitivity = Sensitivity(h, PENALTY, HierarchicalOperator.from_operator(h, max_bytes=8 * 640 * 40, format="auto"))
    out = (x @ w.view(10, 64).T).softmax(1)
    jacobians = torch.einsum("ab,ni->ainb", torch.eye(10), x).reshape(640, SAMPLES, 10)
    slopes, hessians = out - F.one_hot(y, 10), torch.diag_embed(out) - out.unsqueeze(2) * out.unsqueeze(1)
    outputs = sensitivity.leave_one_out(jacobians, slopes, hessians)
    influence = sensitivity.influence(gradients(w, tx, ty), gradients(w, x, y))
    chosen = range(0, SAMPLES, 6)
    own, others = [], []
    for i in chosen:
        rest = [j for j in range(SAMPLES) if j != i]
        new = fitted(x[rest], y[rest], SAMPLES, w)
        own.append(x[i] @ (new - w).view(10, 64).T)
        losses = [F.cross_entropy(tx @ v.view(10, 64).T, ty, reduction="none") for v in (w, new)]
        others.append(losses[1] - losses[0])
    assert correlation(outputs[chosen], torch.stack(own)) >= 0.99
    assert correlation(influence[:, chosen].T, torch.stack(others)) >= 0.99
    assert torch.allclose(outputs[chosen], torch.stack(own), atol=0.1 * float(torch.stack(own).abs().max()))


def test_influence_by_solves(problem):
    (x, y), (tx, ty), w = problem
    a = Hessian(model(w), F.cross_entropy, (x, y)).to_dense()
    damped, few, many = a + PENALTY * torch.eye(640), gradients(w, tx, ty), gradients(w, x, y)
    want = few.T @ torch.linalg.solve(damped, many) / SAMPLES
    approximation = HierarchicalOperator.from_operator(a, 0.3, format="lowrank")
    got = Sensitivity(a, PENALTY, approximation).influence(few, many)
    assert (got - want).norm() <= 1e-6 * want.norm()
    assert (Sensitivity(a, PENALTY).influence(many, few).T * len(ty) - want * SAMPLES).norm() <= 1e-4 * want.norm()


def test_penalty(problem):
    """dθ/dδ = -(A + δI)⁻¹ θ, against another fit."""
    (x, y), _, w = problem
    h = Hessian(model(w), F.cross_entropy, (x, y))
    slope = Sensitivity(h, PENALTY).hyperparameter(w.unsqueeze(1)).squeeze(1)
    eps = 1e-5
    found = [fitted(x, y, SAMPLES, w, PENALTY + sign * eps) for sign in (1, -1)]
    assert ((found[0] - found[1]) / (2 * eps) - slope).norm() <= 1e-3 * slope.norm()


class TestDirect:
    def test_where_it_is_good(self):
        t = torch.linspace(0, 1, 400)
        a = torch.exp(-(t[:, None] - t).abs() / 0.1)
        s = Sensitivity(a, 0.1, HierarchicalOperator.from_operator(a, 1e-6))
        inverse = torch.linalg.inv(a + 0.1 * torch.eye(400))
        torch.testing.assert_close(s.standard_deviations(), inverse.diagonal().sqrt(), rtol=1e-4, atol=0)
        assert float(s.effective_dimension()) == approx(float((a @ inverse).trace()), rel=1e-4)
        j = torch.randn(400, 2)
        torch.testing.assert_close(s.predictive_variance(j), (j * (inverse @ j)).sum(0), rtol=1e-6, atol=0)

    def test_an_error_that_is_not_known(self):
        a = torch.diag(torch.linspace(1, 2, 300))
        h = HierarchicalOperator.from_operator(a, 1e-6).add_low_rank(torch.zeros(300, 1))
        with raises(CurvatureError, match="refreshed"):
            Sensitivity(a, 0.1, h).effective_dimension()
        assert float(Sensitivity(a, 0.1, h.refreshed(a, 1e-6)).effective_dimension()) > 270

    def test_refused_where_it_is_not(self):
        q = torch.linalg.qr(torch.randn(400, 60))[0]
        a = (q * torch.logspace(0, -3, 60)) @ q.T
        s = Sensitivity(a, 1e-4, HierarchicalOperator.from_operator(a, max_bytes=8 * 420 * 20, format="lowrank"))
        with raises(CurvatureError, match="smaller tolerance"):
            s.standard_deviations()
        b = torch.randn(400)
        assert (a @ s.solve(b) + 1e-4 * s.solve(b) - b).norm() <= 1e-7 * b.norm()
        with raises(CurvatureError, match="needs an approximation"):
            Sensitivity(a, 1e-4).effective_dimension()
        for damping in (0.0, float("nan")):
            with raises(ValueError, match="positive"):
                Sensitivity(a, damping)
        with raises(ValueError, match="influence"):
            s.influence(b, a)
        with raises(CurvatureError, match="ended by"):
            Sensitivity(-a, 1e-4).solve(b)
