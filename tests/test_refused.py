"""What curvature cannot be had through is a clear error, and gradients are those of a plain backward pass."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from curvext import HMP, BatchGrad, CurvatureError, DiagGGNExact, DiagHessian, HesScale, extend
from curvext.registry import registered
from curvext.rules.refused import REASONS


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def compare_with_plain(net, loss, match, **options):
    loss().backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    with pytest.raises(CurvatureError, match=match), extend(net, HesScale(**options)):
        loss().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], want, rtol=0, atol=0)
    assert not any(hasattr(p, "hesscale") or hasattr(p, "hesscale_gn") for p in net.parameters())


@pytest.mark.parametrize("part", ["all", "first", "last"])
@pytest.mark.parametrize("gauss_newton", [False, True])
def test_reentrant_checkpoint(part, gauss_newton):
    """Also where no parameter is below the checkpoint in the graph: those inside it would get nothing, silently."""
    net, x = model(), torch.randn(5, 3).requires_grad_()

    def loss():
        if part == "all":
            y = checkpoint(net, x, use_reentrant=True)
        elif part == "first":
            y = net[2](checkpoint(net[:2], x, use_reentrant=True))
        else:
            y = checkpoint(net[1:], net[0](x), use_reentrant=True)
        return y.square().sum()

    compare_with_plain(net, loss, r"CheckpointFunction.*without\s+torch\.utils\.checkpoint", gauss_newton=gauss_newton)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_model():
    net, x = model(), torch.randn(5, 3)
    compiled = torch.compile(net, backend="aot_eager")
    compare_with_plain(net, lambda: compiled(x).square().sum(), r"CompiledFunction.*compiled\._orig_mod")
    with extend(net) as curvature:
        compiled._orig_mod(x).square().sum().backward()
    with torch.compiler.set_stance("force_eager"), extend(net) as eager:
        compiled(x).square().sum().backward()
    torch.testing.assert_close(eager.hesscale, curvature.hesscale)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_model():
    net, x = model(), torch.randn(5, 3)
    scripted = torch.jit.script(net)
    for _ in range(3):  # the graph is fused once it has been profiled
        scripted(x)
    compare_with_plain(net, lambda: scripted(x).square().sum(), r"TorchScript.*before torch\.jit\.script")


def test_flex_attention():
    class FlexAttentionAutogradOp(torch.autograd.Function):  # its own has no backward on the CPU
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    net, x = model(), torch.randn(5, 3)
    compare_with_plain(
        net, lambda: FlexAttentionAutogradOp.apply(net(x)).square().sum(), "scaled_dot_product_attention"
    )


def test_every_refusal_says_what_to_do():
    refused = {operation for operation, rule in registered() if rule.how == "refused"}
    assert refused >= set(REASONS)
    for reason in REASONS.values():
        assert "this step" in reason


@pytest.mark.parametrize("quantity", [DiagHessian, BatchGrad, DiagGGNExact, HMP])
@pytest.mark.parametrize("loss", [True, False])
def test_other_quantities_are_refused_too(quantity, loss):
    """Whether the loss is inside the compiled graph or not."""

    def whole(x):
        return net(x).square().sum()

    net, x = model(), torch.randn(5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled = torch.compile(whole if loss else net, backend="aot_eager")
        with pytest.raises(CurvatureError, match=r"torch\.compile"), extend(net, quantity()):
            (compiled(x) if loss else compiled(x).square().sum()).backward()
