"""First-order and Gauss-Newton quantities against their dense definitions, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from curvext import (
    BatchDiagGGNExact,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    GGNBlock,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
    extend,
)

from . import models
from .dense import blocks, sample_gradients

pytestmark = pytest.mark.usefixtures("float64")

EXACT = (BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), BatchDotGrad(), DiagGGNExact(), BatchDiagGGNExact(),
         SqrtGGNExact(), GGNBlock())  # fmt: skip
N = 5


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def check(model, x, total, parts, **options):
    """``total(z)`` is the loss as users write it, ``parts(z)`` the same as one number for each sample."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    with extend(model, *EXACT, **options):
        total(model(x)).backward()
    near(parts(model(x)).sum(), total(model(x)))
    gradients = sample_gradients(lambda: parts(model(x)), parameters)
    for p, g, block in zip(parameters, gradients, blocks(lambda: model(x), total, parameters), strict=True):
        near(p.grad_batch, g)
        near(p.batch_l2, g.flatten(1).square().sum(1))
        near(p.sum_grad_squared, g.square().sum(0))
        near(p.variance, g.var(0, unbiased=False))
        near(p.batch_dot, g.flatten(1) @ g.flatten(1).T)
        near(p.ggn_block, block)
        near(p.diag_ggn_exact, block.diagonal().view_as(p))
        near(p.diag_ggn_exact_batch.sum(0), p.diag_ggn_exact)
        columns = p.sqrt_ggn_exact.flatten(2).flatten(0, 1)
        near(columns.T @ columns, block)


def labels(*shape, classes=3):
    return torch.randint(0, classes, shape)


def classify(model, *shape):
    y = labels(N)
    check(model, torch.randn(N, *shape), lambda z: F.cross_entropy(z, y),
          lambda z: F.cross_entropy(z, y, reduction="none") / N)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        pytest.param(models.mlp, (4,), id="mlp"),
        pytest.param(lambda: models.mlp(torch.nn.ReLU), (4,), id="relu"),
        pytest.param(models.cnn, (2, 6, 6), id="cnn"),
        pytest.param(lambda: models.Residual().eval(), (2, 4, 4), id="residual"),
    ],
)
def test_images_and_vectors(model, shape):
    classify(model(), *shape)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_sequences(tied, flat):
    """Token losses: every position is an output of its sample."""
    x, y = labels(N, 3, classes=5), labels(N, 3, classes=5)

    def total(z):
        return F.cross_entropy(z.flatten(0, 1), y.flatten()) if flat else F.cross_entropy(z.transpose(1, 2), y)

    def parts(z):
        return F.cross_entropy(z.transpose(1, 2), y, reduction="none").sum(1) / (3 * N)

    check(models.Attention(tied=tied), x, total, parts, samples=N)


def test_squared_error():
    y = torch.randn(N, 3)
    check(models.mlp(), torch.randn(N, 4), lambda z: F.mse_loss(z, y), lambda z: (z - y).square().sum(1) / (3 * N))
