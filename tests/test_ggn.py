"""First-order and Gauss-Newton quantities against their dense definitions, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from curvext import KFLR, NTK, BatchDiagHessian, BatchGrad, Jacobian, SqrtGGNExact, extend

from . import models
from .dense import EXACT, blocks, check, near

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


def test_passes_over_sequences_of_other_lengths():
    """The shorter ones have zeros for columns that they have not."""
    model, passes = models.Attention(), [labels(N, t, classes=5) for t in (3, 2, 4)]
    total = [0.0 for _ in model.parameters()]
    with extend(model, SqrtGGNExact()):
        for x in passes:
            F.cross_entropy(model(x).transpose(1, 2), x).backward()
    for x in passes:
        of_pass = blocks(
            lambda x=x: model(x), lambda z, x=x: F.cross_entropy(z.transpose(1, 2), x), [*model.parameters()]
        )
        total = [a + b for a, b in zip(total, of_pass, strict=True)]
    for p, block in zip(model.parameters(), total, strict=True):
        assert p.sqrt_ggn_exact.shape[:2] == (4 * 5, 3 * N)
        columns = p.sqrt_ggn_exact.flatten(0, 1).flatten(1)
        near(columns.T @ columns, block)


NOTHING = (*EXACT, Jacobian(), NTK(), BatchDiagHessian(), KFLR())


@pytest.mark.parametrize("quantity", NOTHING, ids=lambda q: type(q).__name__)
@pytest.mark.parametrize("loss", [F.mse_loss, F.cross_entropy])
def test_an_empty_batch(quantity, loss):
    model = models.mlp()
    with extend(model, quantity):
        loss(model(torch.randn(0, 4)), torch.randn(0, 3), reduction="sum").backward()
    for p in model.parameters():
        found = getattr(p, quantity.savefield)
        assert not any(t.any() for t in ([found] if isinstance(found, torch.Tensor) else found))
        assert not isinstance(quantity, BatchGrad) or found.shape == (0, *p.shape)


def test_an_empty_part_of_a_batch():
    model, x, y = models.mlp(), torch.randn(N, 4), torch.randn(N, 3)
    check(model, x, lambda z: F.mse_loss(z, y) + F.mse_loss(z[:0], y[:0], reduction="sum"),
          lambda z: (z - y).square().sum(1) / (3 * N))  # fmt: skip
