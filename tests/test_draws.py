"""Random columns of the loss's Hessian: unbiased, independent, and repeatable."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import curvext
from curvext import (
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    DiagGGNExact,
    DiagGGNMC,
    GGNBlock,
    SqrtGGNMC,
    extend,
)

from .dense import near
from .targets import N, P, T, W, Y, data, net

pytestmark = pytest.mark.usefixtures("float64")


M = 2000
SOURCES = {
    "softmax": lambda z: F.cross_entropy(z, Y, weight=W),
    "positions": lambda z: F.cross_entropy(z.unsqueeze(2) * torch.tensor([1.0, 2.0]), Y.unsqueeze(1).expand(N, 2)),
    "diagonal": lambda z: F.binary_cross_entropy_with_logits(z, P),
    "dense": lambda z: (z - T).norm(dim=1).mean(),
    "two sources": lambda z: F.cross_entropy(z, Y) + F.mse_loss(z, T),
    "marked": lambda z: (curvext.output(z) - T).cosh().log().mean(),
}


@pytest.mark.parametrize("name", SOURCES)
def test_draws_are_unbiased(name):
    """Within 4 standard errors, for every sample; all three quantities read the same draws."""
    model, x, loss = net(3), data(N, 2, seed=1), SOURCES[name]
    exact, drawn = (BatchDiagGGNExact(), GGNBlock()), (DiagGGNMC(M), BatchDiagGGNMC(M), SqrtGGNMC(M))
    with extend(model, *exact, *drawn, generator=torch.Generator().manual_seed(3)):
        loss(model(x)).backward()
    for p in model.parameters():
        columns = p.sqrt_ggn_mc
        near(p.diag_ggn_mc_batch, columns.square().sum(0))
        near(p.diag_ggn_mc, p.diag_ggn_mc_batch.sum(0))
        if name == "two sources":  # columns of both, M each
            columns = torch.cat(columns.unsqueeze(0).chunk(2, 1)).transpose(0, 1)
            draws = M * columns.square().sum(1)
        else:
            draws = M * columns.square()
        error = 4 * draws.std(0) / M**0.5 + 1e-12
        assert ((draws.mean(0) - p.diag_ggn_exact_batch).abs() <= error).all()
        rows = p.sqrt_ggn_mc.flatten(2).flatten(0, 1)  # draws of one sample are independent of another's
        assert (rows.T @ rows - p.ggn_block).norm() < 0.1 * p.ggn_block.norm()


def test_draws_of_mixed_samples_are_unbiased():
    model, x = net(3), data(N, 2, seed=1)
    found = []
    for seed in range(100):
        with extend(model, DiagGGNMC(20), DiagGGNExact(), generator=torch.Generator().manual_seed(seed)):
            (model(x) - T).norm().backward()
        found.append(torch.cat([p.diag_ggn_mc.flatten() for p in model.parameters()]))
    exact = torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()])
    draws = torch.stack(found)
    assert ((draws.mean(0) - exact).abs() <= 4 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all()


@pytest.mark.parametrize("name", SOURCES)
def test_generator(name):
    """The same seed gives the same draws, another one others, and the global state is left alone."""
    model, x, loss = net(3), data(N, 2, seed=1), SOURCES[name]

    def drawn(seed):
        with extend(model, SqrtGGNMC(6), generator=torch.Generator().manual_seed(seed)):
            loss(model(x)).backward()
        return model[2].weight.sqrt_ggn_mc

    state = torch.get_rng_state()
    first, again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    with extend(model, SqrtGGNMC(6)):
        loss(model(x)).backward()
    assert not torch.equal(torch.get_rng_state(), state), "without a generator, the global one draws"


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z: F.cross_entropy(z, Y * 0), id="softmax"),
        pytest.param(lambda z: F.mse_loss(z, T * 0), id="diagonal"),
        pytest.param(lambda z: z.norm(dim=1).sum(), id="dense"),
    ],
)
def test_draws_differ_by_sample_and_column(loss):
    """N copies of one sample, with one target, do not all get the same draw; nor do all columns."""
    model, x = net(3), data(1, 2, seed=1).expand(N, 2)
    with extend(model, SqrtGGNMC(8)):
        loss(model(x)).backward()
    columns = model[2].weight.sqrt_ggn_mc
    assert (columns - columns[:1]).abs().amax((0, 2, 3)).min() > 1e-6
    assert (columns - columns[:, :1]).abs().amax((1, 2, 3)).max() > 1e-6
