"""KFRA: the recursion that averages over the samples, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import KFRA, CurvatureError

from .kronecker_factors import N, classes, loss_hessians, near, swept

pytestmark = pytest.mark.usefixtures("float64")


def test_averaged_recursion():
    """KFRA against M_x = 1/N Σ J_nᵀ M J_n with the Jacobians of each layer."""
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.ELU(),
              nn.AvgPool2d(2), nn.Flatten(), nn.Softplus(), nn.Linear(3, 3)]  # fmt: skip
    model, x, y = nn.Sequential(*layers), torch.randn(N, 2, 6, 6), classes(N)
    swept(model, lambda: F.cross_entropy(model(x), y), KFRA())
    xs = [x]
    for layer in layers:
        xs.append(layer(xs[-1]).detach())
    m = loss_hessians(lambda z: F.cross_entropy(z, y), xs[-1]).sum(0)
    for layer, a, b in zip(reversed(layers), reversed(xs[:-1]), reversed(xs[1:]), strict=True):
        if hasattr(layer, "weight"):
            outputs = len(layer.bias)
            apart = m.view(outputs, b[0].numel() // outputs, outputs, -1)
            inputs = a if a.dim() == 2 else F.unfold(a, layer.kernel_size, padding=layer.padding).mT
            inputs = inputs.reshape(-1, inputs.shape[-1])
            near(layer.weight.kfra, [apart.diagonal(0, 1, 3).sum(2), inputs.T @ inputs / len(inputs)])
            near(layer.bias.kfra, [apart.sum((1, 3))])
        jacobians = [torch.func.jacrev(lambda v, f=layer: f(v.unsqueeze(0)).flatten())(v).flatten(1) for v in a]
        m = sum(j.T @ m @ j for j in jacobians) / N


@pytest.mark.parametrize("reduce", [torch.amax, torch.logsumexp])
def test_averaged_recursion_across_reductions(reduce):
    """Their slopes are different in every sample."""
    layer, x = nn.Linear(3, 4), torch.randn(N, 3)
    swept(layer, lambda: reduce(layer(x), 1).square().sum(), KFRA())
    slopes = torch.func.vmap(torch.func.grad(lambda z: reduce(z, 0)))(layer(x).detach())
    near(layer.weight.kfra[0], 2 * slopes.T @ slopes)


@pytest.mark.parametrize("what", ["residual", "twice", "norm"])
def test_averaged_recursion_refuses(what):
    layer, norm, x = nn.Linear(3, 3), nn.LayerNorm(3), torch.randn(N, 3)
    output = {
        "residual": lambda: layer(x) + torch.tanh(layer(x)),
        "twice": lambda: layer(torch.tanh(layer(x))),
        "norm": lambda: norm(layer(x)),
    }[what]
    with pytest.raises(CurvatureError, match="KFRA"):
        swept(nn.ModuleList([layer, norm]), lambda: F.cross_entropy(output(), classes(N)), KFRA())
