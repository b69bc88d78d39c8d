"""Sums of Kronecker products between all pairs of layers: nearest, within their bytes, symmetric."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pytest import approx, fixture, mark, raises
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvext import CurvatureError
from curvext.operators import Dense, FactoredGaussNewton, HierarchicalOperator, KroneckerSum
from curvext.testing_operators import check_operator

from .test_factored import CASES, factored, near

pytestmark = mark.usefixtures("float64")


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def rearranged(a: Tensor, o: int, i: int, p: int, j: int) -> Tensor:
    """Van Loan's order of a block ``[o·i, p·j]``: ``[o·p, i·j]``."""
    return a.view(o, i, p, j).transpose(1, 2).reshape(o * p, i * j)


@mark.parametrize("name", CASES)
def test_of_any_graph(name):
    model, x, y, loss = CASES[name]()
    operator = factored(model, loss(model(x), y))
    dense = operator.to_dense()
    sums = [KroneckerSum.nearest(operator, max_bytes) for max_bytes in (1500, 8000, 10**6)]
    for found, max_bytes in zip(sums, (1500, 8000, 10**6), strict=True):
        got = check_operator(found)
        assert found.bytes <= max_bytes and found.error == approx(error(got, dense), rel=0.4, abs=1e-12)
        near(found.diagonal(), got.diagonal())
        assert float(found.trace()) == approx(float(got.trace()))
    errors = [error(found.to_dense(), dense) for found in sums]
    assert errors[0] > 1e-3 > 1e-12 > errors[2] and errors[0] > errors[1]


def two_layers() -> FactoredGaussNewton:
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(40, 5)
    return factored(model, F.cross_entropy(model(x), torch.randint(0, 3, (40,))))


def test_nearest_by_singular_values():
    """What is left out of every pair is the tail of its rearranged block's singular values."""
    operator = two_layers()
    found = KroneckerSum.nearest(operator, 2400)
    dense, missing = operator.to_dense(), 0.0
    for a in (0, 1):
        for b in range(a, 2):
            (o, i), (p, j) = found.places[a].shape, found.places[b].shape
            block = dense[found.places[a].flatten()][:, found.places[b].flatten()]
            values = torch.linalg.svdvals(rearranged(block, o, i, p, j))
            count = len(found.terms[a, b][0]) if (a, b) in found.terms else 0
            missing += float(values[count:].square().sum()) * (1 + (a < b))
    assert [p.shape for p in found.places] == [(4, 6), (3, 5)]  # each weight with its bias
    assert error(found.to_dense(), dense) == approx(missing**0.5 / float(dense.norm()), rel=1e-6)


def test_a_linear_layer_is_one_product():
    """One layer and squared error: B is the same for all samples."""
    model, x = nn.Linear(4, 3), torch.randn(20, 4)
    found = KroneckerSum.nearest(factored(model, F.mse_loss(model(x), torch.randn(20, 3))), 8 * (9 + 25))
    ((a, b),) = [(left[0], right[0]) for left, right in found.terms.values()]
    inputs = torch.cat([x, torch.ones(20, 1)], 1)
    near(torch.kron(a, b), torch.kron(torch.eye(3), inputs.T @ inputs) * 2 / 60)


@fixture
def autoencoder():
    torch.manual_seed(0)
    x = F.avg_pool2d(torch.tensor(load_digits().images[:150] / 16).unsqueeze(1), 2).flatten(1)
    model = nn.Sequential(*(nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 5), nn.Tanh(), nn.Linear(5, 10)), nn.Tanh(),
                          nn.Linear(10, 16))  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()
    return factored(model, F.mse_loss(model(x), x))


def test_beats_other_formats_on_an_autoencoder(autoencoder):
    dense = autoencoder.to_dense()
    matrix, room = Dense(dense, symmetric=True), 8 * 32 * len(dense)
    found = error(KroneckerSum.nearest(autoencoder, room).to_dense(), dense)
    for form in ("hodlr", "lowrank"):
        other = HierarchicalOperator.from_operator(matrix, max_bytes=room, format=form, leaf=8, max_products=10**4)
        assert 4 * found < error(other.to_dense(), dense)


def test_generator():
    operator = two_layers()
    one, same = (KroneckerSum.nearest(operator, 2400, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one.to_dense(), same.to_dense())


def test_refused():
    operator = two_layers()
    with raises(CurvatureError, match="no room"):
        KroneckerSum.nearest(operator, 100)
    model, x = nn.Linear(2, 2), torch.randn(3, 2)
    with raises(CurvatureError, match="penalty"):
        KroneckerSum.nearest(factored(model, model(x).square().sum() + model.weight.square().sum()), 1000)
    left, right = torch.randn(2, 3, 3), torch.randn(2, 2, 2)
    places = [torch.arange(6).view(3, 2)]
    with raises(ValueError, match="between 0 and 0"):
        KroneckerSum(places, {(0, 0): (right, left)}, 6)
    with raises(CurvatureError, match="no terms"):
        KroneckerSum(places, {}, 6)
