"""First-order and Gauss-Newton quantities against their dense definitions, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from . import models
from .dense import check

pytestmark = pytest.mark.usefixtures("float64")

N = 5


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
