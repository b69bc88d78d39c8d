"""Hierarchical approximations of the curvature of networks on digits: what was specified, at its size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvext.operators import Dense, GaussNewton, Hessian, HierarchicalOperator
from curvext.solvers import cg

from .kernels import error
from .matrices import Counting

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.slow]
build = HierarchicalOperator.from_operator
MANY = 10**5  # products


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10))


def autoencoder() -> nn.Sequential:
    wide = [nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 64)]
    return nn.Sequential(*wide)


def surrogate() -> nn.Sequential:
    wide = [nn.Linear(2, 28), nn.Tanh(), nn.Linear(28, 28), nn.Tanh(), nn.Linear(28, 28), nn.Tanh(), nn.Linear(28, 1)]
    return nn.Sequential(*wide)


def data(make) -> tuple[Tensor, Tensor]:
    if make is surrogate:
        x = 2 * torch.rand(200, 2) - 1
        return x, torch.sin(4 * x[:, :1]) * torch.cos(3 * x[:, 1:])
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.as_tensor(digits.data[:200] / 16), torch.as_tensor(digits.target[:200])
    return x, y if make is perceptron else x


class Problem:
    def __init__(self, make, steps: int = 0):
        self.model, self.data = make(), data(make)
        x = self.data[0]
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(self.model(x), self.data[1]).backward()
            optimizer.step()

    def loss(self, z: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(z, target) if target.is_floating_point() else F.cross_entropy(z, target)

    def matrix(self, kind: type) -> Dense:
        operator = kind(self.model, self.loss, self.data)
        a = operator.to_dense()
        return Dense((a + a.T) / 2, operator.domain, symmetric=True)

    def move(self, step: float) -> None:
        """By ‖Δθ‖ = step ‖θ‖, in a random direction."""
        theta = nn.utils.parameters_to_vector(self.model.parameters()).detach()
        direction = torch.randn_like(theta)
        theta = theta + step * theta.norm() / direction.norm() * direction
        nn.utils.vector_to_parameters(theta, self.model.parameters())


PROBLEMS = {
    "classifier": lambda: Problem(perceptron, 300),
    "autoencoder": lambda: Problem(autoencoder, 300),
    "autoencoder at initialisation": lambda: Problem(autoencoder),
}


@pytest.mark.parametrize("make", [perceptron, surrogate, autoencoder])
def test_tolerances(make):
    a = Problem(make, 300).matrix(GaussNewton).matrix
    for tolerance in (0.1, 1e-2, 1e-3):
        h = build(Counting(a), tolerance, max_products=MANY)
        true = error(h.to_dense(), a)
        assert true <= 1.1 * tolerance and abs(h.error - true) <= 0.25 * true


def test_refreshed():
    """Up to steps of 1 % there is nothing to do; then 0.9 of another build's products at most, by the mean of three."""
    problem = PROBLEMS["classifier"]()
    old = build(Counting(problem.matrix(GaussNewton).matrix), 0.1, max_products=MANY)
    problem.move(0.01)
    assert old.refreshed(problem.matrix(GaussNewton), 0.1).products == 16
    problem.move(0.03)
    a = problem.matrix(GaussNewton).matrix
    assert error(old.to_dense(), a) > 0.125
    new = [old.refreshed(Counting(a), 0.1, max_products=MANY) for _ in range(3)]
    another = [build(Counting(a), 0.1, max_products=MANY) for _ in range(3)]
    assert max(error(h.to_dense(), a) for h in new) <= 0.1
    assert sum(h.products for h in new) <= 0.9 * sum(h.products for h in another)


@pytest.mark.parametrize("name", PROBLEMS)
def test_preconditioner(name):
    """Never more than 1.1 times the steps of low rank and a diagonal, for the same bytes."""
    a = PROBLEMS[name]().matrix(GaussNewton)
    n, b = a.shape[0], torch.randn(a.shape[0])
    shift = 1e-3 * float(torch.linalg.eigvalsh(a.matrix)[-1])
    options = {"max_bytes": 8 * 32 * n, "max_products": MANY}
    best, other = build(a, format="auto", shift=shift, **options), build(a, format="lowrank", **options)
    steps = [cg(a, b, damping=shift, preconditioner=h.factor(shift, True), tolerance=1e-6).steps for h in (best, other)]
    assert steps[0] <= 1.1 * steps[1] and best.bytes <= 8 * 32 * n


@pytest.mark.parametrize(("make", "most"), [(perceptron, 0.45), (autoencoder, 0.2)])
def test_adaptive_at_initialisation(make, most):
    a = Problem(make).matrix(Hessian)
    errors = [build(a, max_bytes=8 * 32 * a.shape[0], format=f).error for f in ("adaptive", "lowrank")]
    assert errors[0] <= most * errors[1]


@pytest.mark.parametrize("name", ["classifier", "autoencoder"])
def test_adaptive_after_training(name):
    """Within 12 % of the better of the others."""
    a = PROBLEMS[name]().matrix(GaussNewton)
    found = {f: build(a, max_bytes=8 * 32 * a.shape[0], format=f) for f in ("adaptive", "lowrank", "hodlr")}
    errors = {f: error(h.to_dense(), a.matrix) for f, h in found.items()}
    assert errors["adaptive"] <= 1.12 * min(errors.values())
