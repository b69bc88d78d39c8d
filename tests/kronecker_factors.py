"""Kronecker factors by their definitions, written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from curvext import KFLR, extend

N = 6


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)


def classes(*shape, c=3):
    return torch.randint(0, c, shape)


def swept(model, loss, *quantities, **options):
    """The results of one backward pass."""
    with extend(model, *(quantities or (KFLR(),)), **options) as curvature:
        loss().backward()
    return curvature


def loss_hessians(loss, z):
    """Every sample's Hessian of loss(z), ``[N, D, D]``."""
    n = len(z)
    b = torch.autograd.functional.hessian(loss, z.detach()).reshape(n, z[0].numel(), n, -1)
    return torch.stack([b[k, :, k] for k in range(n)])


def waves(loss, z, y):
    """Jᵀ S at an intermediate tensor y for columns S with Σ S Sᵀ the loss's Hessian: ``[C, *y.shape]``."""
    values, vectors = torch.linalg.eigh(loss_hessians(loss, z))
    columns = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)).movedim(2, 0).reshape(-1, *z.shape)
    return torch.stack([torch.autograd.grad(z, y, s, retain_graph=True)[0] for s in columns])


def factors(s, x, setting="expand"):
    """The definition from waves ``s [C, N, T, O]`` and inputs ``x [N, T, I]``."""
    if setting == "reduce":
        s, x = s.sum(2, keepdim=True), x.mean(1, keepdim=True)
    n, t = x.shape[:2]
    return torch.einsum("cnto,cntp->op", s, s), torch.einsum("nti,ntj->ij", x, x) / (n * t)


def with_one(x):
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


class Recorded(nn.Module):
    """A layer and a head with a nonlinearity between them; remembers the layer's output."""

    def __init__(self, layer, example):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer(example).flatten(1).shape[1], 3)

    def forward(self, x):
        self.y = self.layer(x)
        return self.head(torch.tanh(self.y).flatten(1))


def recorded(layer, x, setting="expand"):
    """After a pass of KFLR with cross entropy: the layer, and the definition's waves at its output."""
    model, y = Recorded(layer, x), classes(len(x))
    swept(model, lambda: F.cross_entropy(model(x), y), KFLR(setting))
    z = model(x)
    return layer, waves(lambda z: F.cross_entropy(z, y), z, model.y)
