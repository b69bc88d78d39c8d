"""Results of an earlier block are written again only where nobody can see it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from curvext import BatchGrad, SqrtGGNExact, extend

X, Y = torch.linspace(-1, 1, 24).view(6, 4), torch.linspace(1, 2, 18).view(6, 3)


@pytest.fixture
def layer():
    return torch.nn.Linear(4, 3)


def step(layer, scale=1.0, quantity=BatchGrad):
    with extend(layer, quantity()):
        (scale * F.mse_loss(layer(X), Y)).backward()
    return layer.weight


def test_memory_is_written_again(layer):
    place = step(layer).grad_batch.data_ptr()
    first = layer.weight.grad_batch.clone()
    assert step(layer, 2.0).grad_batch.data_ptr() == place
    torch.testing.assert_close(layer.weight.grad_batch, 2 * first)
    place = step(layer, quantity=SqrtGGNExact).sqrt_ggn_exact.data_ptr()
    assert step(layer, quantity=SqrtGGNExact).sqrt_ggn_exact.data_ptr() == place


@pytest.mark.parametrize(
    "hold",
    [lambda g: g, lambda g: g[0], lambda g: g.numpy(), lambda g: g.__dlpack__(), lambda g: g.untyped_storage(),
     lambda g: g.detach(), lambda g: {"inside": [g.flatten()]}],
    ids=["tensor", "view", "numpy", "dlpack", "storage", "detached", "nested"],
)  # fmt: skip
def test_what_is_held_stays(layer, hold):
    held = hold(step(layer).grad_batch)
    want = layer.weight.grad_batch.clone()
    address = layer.weight.grad_batch.data_ptr()
    step(layer, 2.0)
    assert layer.weight.grad_batch.data_ptr() != address and held is not None
    torch.testing.assert_close(layer.weight.grad_batch, 2 * want)


def test_other_shapes_are_not_used(layer):
    step(layer)
    with extend(layer, BatchGrad()):
        F.mse_loss(layer(X[:2]), Y[:2]).backward()
    assert layer.weight.grad_batch.shape == (2, 3, 4)
