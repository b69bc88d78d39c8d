"""How many samples there are, and which rows of the loss are theirs: found out, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import BatchGrad, CurvatureError, DiagGGNExact, GGNBlock, extend

from .dense import blocks, near, sample_gradients
from .models import mlp

pytestmark = pytest.mark.usefixtures("float64")


def data(n=4):
    return torch.randn(n, 4), torch.randint(0, 3, (n,))


def refused(model, loss, match, **options):
    with pytest.raises(CurvatureError, match=match), extend(model, BatchGrad(), **options):
        loss().backward()


@pytest.mark.parametrize("penalty_first", [True, False])
@pytest.mark.parametrize("rows", [2, 4, 5, 8])
@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor.requires_grad_])
class TestPenalties:
    """A term in the weights is nobody's, whatever their shape, and wherever it is in the sum."""

    def built(self, kind, rows, penalty_first):
        w, (x, y) = kind(torch.randn(rows, 3)), data()
        terms = [F.cross_entropy(x @ w[:4] if rows > 4 else x[:, :rows] @ w, y), 0.5 * w.square().sum()]
        return w, x, y, sum(reversed(terms) if penalty_first else terms)

    def test_are_no_samples(self, kind, rows, penalty_first):
        w, *_, loss = self.built(kind, rows, penalty_first)
        refused([w], lambda: loss, "penalty")

    def test_add_to_the_curvature(self, kind, rows, penalty_first):
        w, x, y, loss = self.built(kind, rows, penalty_first)
        with extend([w], DiagGGNExact(), GGNBlock()):
            loss.backward()
        x = x[:, :rows]
        (want,) = blocks(lambda: x @ w[:4], lambda z: F.cross_entropy(z, y), [w])
        near(w.ggn_block, want + torch.eye(3 * rows))
        near(w.diag_ggn_exact, w.ggn_block.diagonal().view_as(w))


@pytest.mark.parametrize("sizes", [(4, 6), (6, 4), (4, 5), (5, 4)])
def test_two_batches_of_sizes_that_do_not_divide(sizes):
    """Curvature does not ask how the loss is divided."""
    model, (x, y), (u, v) = mlp(), data(sizes[0]), data(sizes[1])
    loss = lambda: F.cross_entropy(model(x), y) + F.cross_entropy(model(u), v)  # noqa: E731
    refused(model, loss, "multiple")
    with extend(model, DiagGGNExact()):
        loss().backward()
    parameters = list(model.parameters())
    wants = [
        blocks(lambda a=a: model(a), lambda z, b=b: F.cross_entropy(z, b), parameters) for a, b in ((x, y), (u, v))
    ]
    for p, first, second in zip(parameters, *wants, strict=True):
        near(p.diag_ggn_exact, (first + second).diagonal().view_as(p))


@pytest.mark.parametrize("sizes", [(4, 8), (8, 4)])
def test_two_batches_of_which_one_divides_the_other(sizes):
    model, (x, y), (u, v) = mlp(), data(sizes[0]), data(sizes[1])
    loss = lambda: F.cross_entropy(model(x), y) + F.cross_entropy(model(u), v)  # noqa: E731
    refused(model, loss, "dimensions are 4 and 8.*samples=")
    refused(model, loss, "multiple", samples=8)
    with extend(model, BatchGrad(), samples=4):
        loss().backward()
    two, one = (u, v) if sizes[1] == 8 else (x, y), (x, y) if sizes[1] == 8 else (u, v)

    def parts():
        pairs = F.cross_entropy(model(two[0]), two[1], reduction="none").view(4, 2).sum(1) / 8
        return pairs + F.cross_entropy(model(one[0]), one[1], reduction="none") / 4

    for p, want in zip(model.parameters(), sample_gradients(parts, list(model.parameters())), strict=True):
        near(p.grad_batch, want)


@pytest.mark.parametrize("samples", [3, 5, 8])
def test_a_number_of_samples_that_does_not_divide(samples):
    model, (x, y) = mlp(), data()
    refused(model, lambda: F.cross_entropy(model(x), y), "multiple", samples=samples)


def test_rows_that_were_picked_from_sequences():
    """Eight tokens of four samples, two of the first, three of another: no reshape tells whose they are."""
    cell, x, y = nn.LSTM(4, 3, batch_first=True), torch.randn(4, 3, 4), torch.randint(0, 3, (4, 3))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    loss = lambda: F.cross_entropy(cell(x)[0][mask], y[mask])  # noqa: E731
    refused(cell, loss, "IndexBackward0.*which of the 4 samples", samples=4)
    with extend(cell, BatchGrad()):
        loss().backward()
    gradients = sample_gradients(
        lambda: F.cross_entropy(cell(x)[0][mask], y[mask], reduction="none") / 8, list(cell.parameters())
    )
    for p, want in zip(cell.parameters(), gradients, strict=True):
        near(p.grad_batch, want)


def test_the_batch_as_one_sample():
    model, (x, y) = mlp(), data()
    with extend(model, BatchGrad(), samples=1):
        (F.cross_entropy(model(x), y) + model[0].weight.square().sum()).backward()
    for p in model.parameters():
        near(p.grad_batch, p.grad.unsqueeze(0))


def test_weights_for_the_samples_as_gradient_of_their_losses():
    model, (x, y), w = mlp(), data(), torch.rand(4)
    with extend(model, BatchGrad()):
        F.cross_entropy(model(x), y, reduction="none").backward(gradient=w)
    gradients = sample_gradients(lambda: w * F.cross_entropy(model(x), y, reduction="none"), list(model.parameters()))
    for p, want in zip(model.parameters(), gradients, strict=True):
        near(p.grad_batch, want)


def test_batch_normalisation_in_training_is_refused_by_name():
    model, (x, y) = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)), data()
    refused(model, lambda: F.cross_entropy(model(x), y), "nearest parameter 1.weight.*mixes the samples.*samples=1")
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(plain, [p.grad for p in model.parameters()], rtol=0, atol=0)
