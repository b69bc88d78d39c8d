"""Newton-type optimizers on the digits of scikit-learn."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext.optim import (
    NewtonCG,
    SaddleFreeNewton,
)

from .optimizers import classified, digits

pytestmark = pytest.mark.usefixtures("float64")


def test_logistic_regression_as_scipy():
    scipy = pytest.importorskip("scipy.optimize")
    pytest.importorskip("sklearn")
    x, _, y, _ = digits()
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    optimizer = NewtonCG(model.parameters(), weight_decay=1e-2, steps=500)
    norms = []
    for _ in range(13):
        optimizer.step(classified(model, x, y))
        norms.append(optimizer.report.details["gradient"])  # before the step
    assert norms[10] < 1e-10 and min(norms[:13]) < 1e-8
    assert all(b < a**1.3 for a, b in pairwise(norms) if 1e-7 < a < 1e-2)  # superlinear
    design, onehot = torch.cat([x, torch.ones(len(x), 1)], 1), F.one_hot(y, 10).double()

    def both(w):
        w = torch.tensor(w).view(10, 65)
        z = design @ w.T
        g = (z.softmax(1) - onehot).T @ design / len(x) + 1e-2 * w
        return float(F.cross_entropy(z, y) + 0.005 * w.square().sum()), g.flatten().numpy()

    found = scipy.minimize(
        both, [0.0] * 650, jac=True, method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 0, "maxiter": 5000}
    )
    assert abs(found.fun - optimizer.report.after) < 1e-8
    w = torch.cat([model.weight, model.bias[:, None]], 1).detach().flatten()
    torch.testing.assert_close(w, torch.tensor(found.x), rtol=0, atol=1e-5)


NEWTON_TYPE = {
    "Newton-CG": (NewtonCG, {}),
    "Newton-CG, Gauss-Newton": (NewtonCG, {"curvature": "gauss_newton"}),
    "saddle-free": (SaddleFreeNewton, {}),
    "saddle-free, adaptive": (SaddleFreeNewton, {"momentum": "adaptive"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NEWTON_TYPE)
def test_digits(name, seed):
    x, x_test, y, y_test = digits()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    cls, settings = NEWTON_TYPE[name]
    optimizer = cls(model.parameters(), weight_decay=1e-3, **settings)
    for k in range(20):
        optimizer.step(classified(model, x, y))
        if k == 4 and settings.get("curvature") == "gauss_newton":
            assert optimizer.report.after <= 0.35
    assert optimizer.report.after <= 0.16
    assert float((model(x_test).argmax(1) == y_test).double().mean()) >= 0.96


def test_series_with_the_adaptive_step_beats_the_source():
    """Digits, 12 steps of 9 terms: the same products up to two a step."""
    x, _, y, _ = digits()
    ends = {}
    for momentum in (0.0, "adaptive"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        optimizer = SaddleFreeNewton(model.parameters(), method="series", terms=9, momentum=momentum, weight_decay=1e-3)
        for _ in range(12):
            optimizer.step(classified(model, x[:300], y[:300]))
        ends[momentum] = optimizer.report.after
    assert ends["adaptive"] < 0.9 * ends[0.0] and math.isfinite(ends["adaptive"])
