"""Operations in place on views: the structure is proven from derivatives, and no gradient is disturbed."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from curvext import SampledOperationWarning, extend


def _written(y):
    z = torch.zeros(50, 20, dtype=y.dtype)
    z[:, :10] = y[:, :10]
    z[:, 10:] = y[:, 10:].tanh()
    z[:, 3].mul_(2.0)
    z[5:].sigmoid_()
    return z


def _functional(y):
    scale = torch.ones(20, dtype=y.dtype)
    scale[3] = 2
    z = torch.cat([y[:, :10], y[:, 10:].tanh()], 1) * scale
    return torch.cat([z[:5], z[5:].sigmoid()])


def _step(w, x, function=_written):
    w = w.detach().requires_grad_()
    with extend([w], enumerate_up_to=0):  # warnings are errors: nothing is sampled
        function(x @ w).square().sum().backward()
    return w.grad, w.hesscale


@pytest.fixture
def layer(float64):
    return torch.randn(20, 20), torch.randn(50, 20)


def test_pointwise_writes_are_exact(layer):
    (grad, wave), (want_grad, want) = _step(*layer), _step(*layer, _functional)
    torch.testing.assert_close(grad, want_grad)
    torch.testing.assert_close(wave, want)


def test_pointwise_writes_are_traced(layer):
    traced = make_fx(lambda w, x: _step(w, x))(*layer)
    for got, want in zip(traced(*layer), _step(*layer), strict=True):
        torch.testing.assert_close(got, want)


def test_other_writes_are_sampled(layer):
    def accumulated(y):
        z = y.clone()
        z[1:].cumsum_(0)
        return z

    with pytest.warns(SampledOperationWarning, match="CopySlices"):
        _step(*layer, accumulated)


def test_global_generator_is_untouched(layer):
    state = torch.get_rng_state()
    _step(*layer)
    assert torch.equal(state, torch.get_rng_state())
