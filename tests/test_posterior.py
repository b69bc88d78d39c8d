"""Gaussians around solutions: what is drawn from them has the covariance of their definition."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from curvext import CurvatureError
from curvext.posterior import SWAG, HessTrucks
from curvext.spectra import eigenpairs

pytestmark = pytest.mark.usefixtures("float64")
P = 6


def has_moments(x, mean, covariance):
    """Of columns ``[P, n]`` that a Gaussian has given, to five standard deviations."""
    n, d = x.shape[1], covariance.diagonal()
    assert ((x.mean(1) - mean).abs() < 5 * (d / n).sqrt()).all()
    error = 5 * ((d.outer(d) + covariance**2) / n).sqrt()
    assert ((x.cov() - covariance).abs() < error).all()
    off = covariance - d.diag()
    assert not off.any() or (off.abs() > error).any(), "too few draws to tell anything"


def collected(rank, times):
    swag = SWAG(rank)
    walk = (torch.randn(times, P) @ torch.randn(P, P)).cumsum(0)
    for θ in walk:
        swag.collect([θ[:2].view(2, 1), θ[2:]])
    return swag, walk


@pytest.mark.parametrize("rank, times", [(4, 12), (20, 5), (0, 7), (2, 2)])
def test_swag_is_its_definition(rank, times):
    swag, walk = collected(rank, times)
    torch.testing.assert_close(swag.mean, walk.mean(0))
    want = walk.square().mean(0).sub(walk.mean(0).square()).diag()
    if rank:
        D = torch.stack([walk[k] - walk[: k + 1].mean(0) for k in range(times)][-rank:], 1)
        want = (want + D @ D.T / (min(rank, times) - 1)) / 2
    torch.testing.assert_close(swag.covariance.to_dense(), want)
    has_moments(swag.draw(20_000), swag.mean, want)


def test_swag_keeps_its_precision_far_from_zero():
    """Means of squares less squares of means would have none of it left."""
    swag, away = SWAG(0), torch.tensor([1e8])
    for step in (0.0, 1.0, 2.0):
        swag.collect([away + step])
    torch.testing.assert_close(swag.variance, torch.tensor([2 / 3]))


def test_swag_survives_copies_and_sets_a_model():
    model = nn.Linear(3, 2)
    swag = SWAG(3)
    for _ in range(4):
        nn.init.normal_(model.weight)
        swag.collect(model.parameters())
    draws = [
        s.draw(2, torch.Generator().manual_seed(0))
        for s in (swag, copy.deepcopy(swag), pickle.loads(pickle.dumps(swag)))
    ]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    nn.utils.vector_to_parameters(draws[0][:, 1], model.parameters())
    assert torch.equal(model.weight.flatten(), draws[0][:6, 1])


def test_swag_refuses():
    for rank in (-1, 1):
        with pytest.raises(ValueError, match="rank"):
            SWAG(rank)
    swag = SWAG()
    swag.collect([torch.ones(2)])
    with pytest.raises(CurvatureError, match="two times or more, not 1"):
        swag.draw()
    with pytest.raises(ValueError, match="3 weights, and 2 before"):
        swag.collect([torch.ones(3)])


@pytest.mark.parametrize("k", [2, P])
def test_hess_trucks_is_its_definition(k):
    """With the largest eigenpairs, and with all of them, one negative."""
    Q, h, a = torch.linalg.qr(torch.randn(P, P))[0], torch.tensor([9.0, 4.0, 1.0, 0.5, 0.1, -0.2]), 0.5
    mean, pairs = torch.randn(P), eigenpairs(Q @ h.diag() @ Q.T, k)
    posterior = HessTrucks(mean, pairs.values, pairs.vectors, a)
    known = torch.where(torch.arange(P) < k, h.clamp(min=0), 0)
    want = Q @ (1 / (known + a)).diag() @ Q.T
    torch.testing.assert_close(posterior.covariance.to_dense(), want)
    torch.testing.assert_close(posterior.log_determinant(), torch.logdet(want))
    torch.testing.assert_close(posterior.effective_dimension(), (known / (known + a)).sum())
    has_moments(posterior.draw(20_000), mean, want)


def test_hess_trucks_refuses():
    unit = torch.eye(3)[:, :2]
    for precision in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="precision"):
            HessTrucks(torch.ones(3), torch.ones(2), unit, precision)
    with pytest.raises(ValueError, match=r"vectors \(3, 2\) for 4 weights and 2 values"):
        HessTrucks(torch.ones(4), torch.ones(2), unit, 1.0)
    with pytest.raises(ValueError, match="orthonormal"):
        HessTrucks(torch.ones(3), torch.ones(2), 2 * unit, 1.0)
