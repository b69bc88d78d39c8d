"""Pointwise operations where PyTorch's own second derivative is nan, or where autograd in steps would lose accuracy."""

import pytest
import torch
import torch.nn.functional as F

from curvext import HesScale, extend


def hesscale(function, x):
    x = x.clone().requires_grad_()
    with extend({"x": x}, HesScale()):
        function(x).sum().backward()
    return x.hesscale


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0])
def test_powers_at_zero(exponent):
    x = torch.zeros(3, dtype=torch.float64)
    want = torch.full_like(x, 2.0 if exponent == 2 else 0.0)
    torch.testing.assert_close(hesscale(lambda x: x**exponent, x), want)
    torch.testing.assert_close(hesscale(lambda x: x ** torch.full_like(x, exponent), x), want)


def test_powers_of_zero():
    x = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(hesscale(lambda x: 0.0**x, x), torch.zeros_like(x))
    torch.testing.assert_close(hesscale(lambda x: torch.zeros_like(x) ** x, x), torch.zeros_like(x))


@pytest.mark.parametrize(
    "activation", [F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.silu, F.mish, F.softplus, F.logsigmoid, F.elu]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_far_from_zero(activation, dtype):
    """All of these are linear there, or constant."""
    x = torch.tensor([-1e4, -200.0, 200.0, 1e4], dtype=dtype)
    assert hesscale(activation, x).abs().max() < 1e-6
