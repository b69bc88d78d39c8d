"""Every optimizer that steps by a closure, in each of its forms, and a small problem for all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext.optim import (
    LBFGS,
    CurveBall,
    DiagGaussNewton,
    DiagonalPreconditioner,
    GaussNewtonCG,
    GradientDescent,
    HessianFree,
    KroneckerPreconditioner,
    Lagged,
    NewtonCG,
    SaddleFreeNewton,
)
from curvext.solvers import Constant, FullStep, LevenbergMarquardt, StrongWolfe

# name: class, settings. An optimizer that curvext.optim exports and that is not here fails the suite.
CASES = {
    "gradient descent": (GradientDescent, {}),
    "gradient descent, Wolfe": (GradientDescent, {"line_search": StrongWolfe()}),
    "gradient descent, full steps": (GradientDescent, {"line_search": FullStep(0.1)}),
    "L-BFGS, Armijo": (LBFGS, {"memory": 3}),
    "L-BFGS, Wolfe": (LBFGS, {"line_search": StrongWolfe()}),
    "Newton-CG": (NewtonCG, {}),
    "Newton-CG, absolute, hesscale": (NewtonCG, {"negative": "absolute", "preconditioner": "hesscale"}),
    "Newton-CG, Gauss-Newton": (NewtonCG, {"curvature": "gauss_newton", "steps": 5}),
    "Newton-CG, damped, kfac": (
        NewtonCG,
        {"curvature": "gauss_newton", "damping": LevenbergMarquardt(first=0.1), "preconditioner": "kfac"},
    ),
    "Newton-CG, MINRES, lagged": (
        NewtonCG,
        {"solver": "minres", "preconditioner": Lagged(KroneckerPreconditioner(), growth=1.0)},
    ),
    "diagonal Gauss-Newton": (DiagGaussNewton, {}),
    "diagonal Gauss-Newton, unscaled": (DiagGaussNewton, {"rescale": False, "damping": LevenbergMarquardt()}),
    "CurveBall": (CurveBall, {"interval": 2}),
    "CurveBall, full steps": (CurveBall, {"line_search": None, "interval": 1}),
    "Gauss-Newton-CG": (GaussNewtonCG, {}),
    "Gauss-Newton-CG, kflr": (GaussNewtonCG, {"preconditioner": "kflr", "tolerance": 0.3}),
    "Gauss-Newton-CG, stored": (GaussNewtonCG, {"jacobian": "auto"}),
    "Gauss-Newton-CG, lagged": (GaussNewtonCG, {"preconditioner": Lagged(KroneckerPreconditioner())}),
    "Hessian-free": (HessianFree, {}),
    "Hessian-free, lagged": (HessianFree, {"preconditioner": Lagged(DiagonalPreconditioner())}),
    "Hessian-free, hesscale": (HessianFree, {"preconditioner": "hesscale", "damping": LevenbergMarquardt(first=0.1)}),
    "Hessian-free, Hessian": (HessianFree, {"curvature": "hessian", "negative": "absolute", "backtracking": False}),
    "Hessian-free, blocks": (HessianFree, {"blocks": "group", "decay": 0.5, "warm_ratio": True}),
    "saddle-free, Lanczos": (SaddleFreeNewton, {"products": 8}),
    "saddle-free, Lanczos, adaptive": (SaddleFreeNewton, {"products": 4, "momentum": "adaptive"}),
    "saddle-free, Lanczos, momentum": (SaddleFreeNewton, {"products": 4, "momentum": 0.3, "line_search": None}),
    "saddle-free, two passes": (SaddleFreeNewton, {"products": 5, "two_passes": True}),
    "saddle-free, series": (SaddleFreeNewton, {"method": "series", "terms": 6, "scale": 1.0}),
    "saddle-free, series, adaptive": (
        SaddleFreeNewton,
        {"method": "series", "terms": 5, "order": 2, "scale_decay": 0.95, "momentum": "adaptive", "scale": 1.0},
    ),
    "saddle-free, constant damping": (SaddleFreeNewton, {"products": 3, "damping": Constant(0.5)}),
}


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def make(name, params, **settings):
    cls, own = CASES[name]
    return cls(params, **{**own, **settings})


class Net(nn.Module):
    """A smooth network with a weight nobody uses, on data of its own."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.lower, self.upper = nn.Linear(4, 5), nn.Linear(5, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.upper(torch.tanh(self.lower(x)))


def classified(model, x, y):
    """A closure that returns the loss and the outputs."""

    def closure():
        z = model(x)
        return F.cross_entropy(z, y), z

    return closure


def problem(model, part=slice(None)):
    """The closure for :class:`Net`."""
    generator = torch.Generator().manual_seed(3)
    dtype = model.lower.weight.dtype
    x = torch.randn(12, 4, generator=generator, dtype=dtype)[part]
    return classified(model, x, torch.arange(12)[part] % 3)


def digits():
    """Inputs ``[N, 64]`` and labels, to train with and to test with: x, x_test, y, y_test."""
    sklearn = pytest.importorskip("sklearn.datasets")
    from sklearn.model_selection import train_test_split

    x, y = sklearn.load_digits(return_X_y=True)
    parts = train_test_split(x / 16.0, y, test_size=450, stratify=y, random_state=0)
    return [torch.tensor(part) for part in parts]
