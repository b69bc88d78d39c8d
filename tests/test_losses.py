"""Losses that need more than a case."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvext
from curvext import KFAC, CurvatureError, DiagGGNExact, HesScale, Jacobian, SumGradSquared, extend

from .reference import hessian


def test_ctc_ignores_what_is_not_there():
    """Frames after the end, and samples without a path, have no curvature; the rest is what it is alone."""
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    targets, options = torch.tensor([[1, 2], [1, 1]]), {"zero_infinity": True, "reduction": "sum"}
    with extend([x]) as curvature:
        F.ctc_loss(x.log_softmax(2), targets, (3, 2), (2, 2), **options).backward()  # 1, 1 needs three frames
    both = curvature.hesscale["0"]
    assert not both[3].any()
    assert not both[:, 1].any()
    with extend([x]) as curvature:
        F.ctc_loss(x[:3, :1].log_softmax(2), targets[:1], (3,), (2,), **options).backward()
    torch.testing.assert_close(both[:3, 0], curvature.hesscale["0"][:3, 0])


def test_ctc_of_one_frame_is_exact():
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([1, 3, 2])
    with extend([x]) as curvature:
        F.ctc_loss(x.log_softmax(2), t, (1, 1, 1), (1, 1, 1), reduction="sum").backward()
    want = hessian(lambda: F.nll_loss(x[0].log_softmax(1), t, reduction="sum"), [x]).diagonal()
    torch.testing.assert_close(curvature.hesscale["0"].reshape(-1), want)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no linear_cross_entropy")
def test_chunked_loss_is_refused_and_its_gradient_kept():
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    x, t = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    w = torch.randn(4, 3, requires_grad=True)
    options = LinearCrossEntropyOptions(batch_chunk_size=2)
    with pytest.raises(CurvatureError, match="reduction='none'"), extend([w]):
        F.linear_cross_entropy(x, w, t, options=options).backward()
    got, w.grad = w.grad, None
    F.cross_entropy(x @ w.T, t).backward()
    torch.testing.assert_close(got, w.grad)


def test_ctc_has_no_gauss_newton_matrix(float64):
    """It is not convex, and what the error names instead works."""
    model, x, labels = nn.Linear(2, 3), torch.randn(4, 2, 2), torch.tensor([[1, 2], [2, 1]])

    def loss(mark=lambda z: z):
        return F.ctc_loss(mark(model(x)).log_softmax(2), labels, (4, 4), (2, 2))

    z = model(x).detach()
    spectrum = torch.linalg.eigvalsh(hessian_of_ctc(z, labels))
    assert spectrum.min() < -0.01 < 0.01 < spectrum.max()
    for quantity in (DiagGGNExact(), KFAC(), Jacobian()):
        match = r"CTC loss is convex neither.*KFAC\(empirical=True\)"
        with pytest.raises(CurvatureError, match=match), extend(model, quantity, samples=2):
            loss().backward()
    with extend(model, HesScale(), KFAC(empirical=True), SumGradSquared(), samples=2):
        loss().backward()
    with extend(model, Jacobian(), samples=2):
        loss(curvext.output).backward()
    assert model.weight.jacobian.shape == (12, 2, 3, 2)


def hessian_of_ctc(z, labels):
    """By differences of gradients: PyTorch cannot differentiate it twice."""

    def gradient(z):
        z = z.requires_grad_()
        return torch.autograd.grad(F.ctc_loss(z.log_softmax(2), labels, (4, 4), (2, 2)), z)[0].flatten()

    steps = 1e-5 * torch.eye(z.numel()).view(-1, *z.shape)
    rows = torch.stack([gradient(z + step) - gradient(z - step) for step in steps]) / 2e-5
    return (rows + rows.T) / 2
