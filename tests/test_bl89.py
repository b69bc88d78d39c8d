"""Becker and LeCun's rule (1989) from its definition: each softmax output is a function of its own logit alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import BL89, HesScale, extend

LOSSES = {
    "log_softmax": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "softmax, log": lambda z, y: -z.softmax(-1).log().gather(1, y[:, None]).sum(),
    "log_softmax, gather": lambda z, y: -z.log_softmax(-1).gather(1, y[:, None]).sum(),
    "masked": lambda z, y: -torch._masked_softmax(z, z.detach() > 99, 1, 2).log().gather(1, y[:, None]).sum(),
    "safe": lambda z, y: -torch._safe_softmax(z, 1).log().gather(1, y[:, None]).sum(),
}


@pytest.fixture
def z(float64):
    return torch.randn(5, 4, requires_grad=True)


Y = torch.tensor([0, 3, 1, 1, 2])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_only_the_true_class_has_curvature(z, loss):
    with extend([z], BL89(), HesScale()):
        loss(z, Y).backward()
    q = z.detach().softmax(-1)
    torch.testing.assert_close(z.bl89, F.one_hot(Y, 4) * q * (1 - q))
    torch.testing.assert_close(z.hesscale.sum(), (q - q * q).sum())


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_mean_loss_divides(z, loss):
    with extend([z], BL89()):
        (loss(z, Y) / 5).backward()
    q = z.detach().softmax(-1)
    torch.testing.assert_close(z.bl89, F.one_hot(Y, 4) * q * (1 - q) / 5)


def test_softmax_is_elementwise_under_any_loss(z):
    """q' = q (1 - q), q'' = q' (1 - 2q), whatever the curvature of the loss in q."""
    target = torch.rand(5, 4)
    with extend([z], BL89()):
        ((z.softmax(-1) - target) ** 2).sum().backward()
    q = z.detach().softmax(-1)
    slope = q * (1 - q)
    torch.testing.assert_close(z.bl89, 2 * slope**2 + 2 * (q - target) * slope * (1 - 2 * q))


def test_log_softmax_is_a_logarithm_after_the_elementwise_softmax(z):
    weights = torch.randn(5, 4)

    def loss(log_q):
        return (weights * log_q + log_q**2 / 2).sum()

    results = []
    for log_q in (lambda z: z.softmax(-1).log(), lambda z: z.log_softmax(-1)):
        with extend([z], BL89()) as curvature:
            loss(log_q(z)).backward()
        results.append(curvature.bl89["0"])
    torch.testing.assert_close(*results)


def test_the_recursion_below_the_softmax(float64):
    """h_W = hᵀ(x∘x), then f'² Wᵀ²h + f'' g, from the diagonal at the logits."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    x = torch.randn(5, 3)
    with extend(model, BL89()):
        F.cross_entropy(model(x), Y).backward()
    with torch.no_grad():
        t = model[:2](x)
        q = model(x).softmax(-1)
        hit = F.one_hot(Y, 4)
        h, g = hit * q * (1 - q) / 5, (q - hit) / 5
        torch.testing.assert_close(model[2].weight.bl89, h.T @ t**2)
        torch.testing.assert_close(model[2].bias.bl89, h.sum(0))
        h = (1 - t * t) ** 2 * (h @ model[2].weight ** 2) - 2 * t * (1 - t * t) * (g @ model[2].weight)
        torch.testing.assert_close(model[0].weight.bl89, h.T @ x**2)
        torch.testing.assert_close(model[0].bias.bl89, h.sum(0))
