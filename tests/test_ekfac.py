"""EKFAC: the diagonal in the eigenbasis of Kronecker factors, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import EKFAC, KFLR, CurvatureError, GGNBlock, Kronecker, extend

from .kronecker_factors import N, Recorded, classes, near, swept

pytestmark = pytest.mark.usefixtures("float64")


def eigenbasis_cases():
    yield "conv", lambda: nn.Conv2d(2, 3, 3, padding=1), torch.randn(N, 2, 3, 3)
    yield "grouped", lambda: nn.Conv2d(4, 4, 2, groups=2), torch.randn(N, 4, 3, 3)
    yield "transposed", lambda: nn.ConvTranspose1d(2, 3, 2, stride=2), torch.randn(N, 2, 3)
    yield "positions", lambda: nn.Linear(2, 3), torch.randn(N, 4, 2)
    yield "embedding", lambda: nn.Embedding(5, 3), classes(N, 4, c=5)


@pytest.mark.parametrize(("make", "x"), [pytest.param(m, x, id=n) for n, m, x in eigenbasis_cases()])
def test_eigenbasis(make, x):
    """In the eigenbasis of the factors, the diagonal is the block's own."""
    x = x.to(torch.get_default_dtype()) if x.is_floating_point() else x
    model, y = Recorded(make(), x), classes(N)
    found = swept(model, lambda: F.cross_entropy(model(x), y), KFLR(), EKFAC(None), GGNBlock())
    weight = model.layer.weight
    got, block = weight.ekfac, weight.ggn_block
    vectors = [torch.eye(n).repeat(got.dims[0], 1, 1) if q is None else q.reshape(got.dims[0], n, n).contiguous()
               for q, n in zip(got.vectors, got.dims[1:], strict=True)]  # fmt: skip
    q = torch.block_diag(*[torch.kron(*pair) for pair in zip(*vectors, strict=True)])
    near(q.T @ q, torch.eye(len(q)))
    near(got.values.flatten(), (q.T @ block @ q).diagonal())
    rotated = q.T @ Kronecker(weight.kflr, weight.shape).dense() @ q
    near(rotated, rotated.diagonal().diag())
    assert (got.dense() - block).norm() <= (Kronecker(weight.kflr, weight.shape).dense() - block).norm()
    with extend(model, EKFAC(None, basis=found.ekfac)) as parts:  # the sum over parts of a batch, in a given basis
        for part in (slice(0, 2), slice(2, N)):
            (F.cross_entropy(model(x[part]), y[part]) * len(y[part]) / N).backward()
    for name, whole in found.ekfac.items():
        near(parts.ekfac[name].dense(), whole.dense())


def test_eigenbases_of_several_passes_do_not_add_up():
    model, x, y = nn.Linear(4, 3), torch.randn(N, 4), classes(N)
    with pytest.raises(CurvatureError, match="EKFAC\\(basis="), extend(model, EKFAC()):
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(x), y).backward()


def test_a_basis_of_something_else():
    """That of scalars has one entry."""
    model = nn.ParameterDict({"w": torch.randn(3, 3), "v": torch.randn(3, 2), "s": torch.randn(())})
    x, y = torch.randn(N, 3), classes(N, c=2)

    def swept(basis=None):
        with extend(model, EKFAC(basis=basis)) as found:
            F.cross_entropy(torch.tanh(x @ model["w"]) @ model["v"] * model["s"], y).backward()
        return found.ekfac

    basis = dict(swept())
    swept(basis)
    for other in ({**basis, "v": basis["w"]}, {"w": basis["w"], "s": basis["s"]}, {**basis, "v": model["v"]}):
        with pytest.raises(CurvatureError, match=r"basis has no Eigenbasis of shape \(3, 2\) for 'v'"):
            swept(other)
