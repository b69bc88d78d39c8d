"""Quantities that tell samples apart, under autocast: parameters' dtype, and close to those without."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import (
    GGNMP,
    BatchDiagGGNExact,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    GGNBlock,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
    extend,
)

from .models import Attention, cnn, mlp

QUANTITIES = (BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), BatchDotGrad(), DiagGGNExact(),
              BatchDiagGGNExact(), GGNBlock(), SqrtGGNExact())  # fmt: skip


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Attention()

    def forward(self, x):
        return self.inner(x).mean(1)[:, :3]


def normalised():
    """Weights in single precision that meet 16 bits."""
    norms = nn.BatchNorm2d(4).eval(), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(16)
    return nn.Sequential(nn.Conv2d(2, 4, 2), *norms, nn.Linear(16, 3))


CASES = {
    "mlp": lambda: (mlp(), torch.randn(6, 4)),
    "cnn": lambda: (cnn(), torch.randn(6, 2, 6, 6)),
    "normalised": lambda: (normalised(), torch.randn(6, 2, 3, 3)),
    "attention": lambda: (Tokens(), torch.randint(0, 5, (6, 3))),
}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_close_to_full_precision(name, inside):
    (model, x), y = CASES[name](), torch.randint(0, 3, (6,))
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = None if inside else F.cross_entropy(model(x), y)
        with extend(model, *QUANTITIES) as curvature:
            if inside:
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    loss = F.cross_entropy(model(x), y)
            loss.backward()
        results.append({field: dict(values) for field, values in curvature.items()})
    for field, values in results[1].items():
        for parameter, value in values.items():
            want = results[0][field][parameter]
            assert value.dtype is torch.float32 and value.shape == want.shape, (field, parameter)
            assert (value - want).norm() <= 0.06 * want.norm() + 1e-6, (field, parameter)


@pytest.mark.parametrize("name", CASES)
def test_products(name):
    (model, x), y = CASES[name](), torch.randint(0, 3, (6,))
    directions = [torch.randn(1, *p.shape) for p in model.parameters()]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(x), y)
        with extend(model, GGNMP()):
            loss.backward()
        results.append([p.ggnmp(v) for p, v in zip(model.parameters(), directions, strict=True)])
    for want, got in zip(*results, strict=True):
        assert got.dtype is torch.float32
        assert (got - want).norm() <= 0.1 * want.norm() + 1e-6
