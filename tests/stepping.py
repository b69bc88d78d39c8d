"""One problem, and the ways to take an optimizer's step on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from curvext import HesScale, extend

X, Y = torch.randn(7, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 2, 1, 1, 0, 2, 2])


def loss_of(model):
    dtype = next(model.parameters()).dtype
    return lambda: F.cross_entropy(model(X.to(dtype)), Y)


def block_step(model, optimizer):
    optimizer.zero_grad()
    with extend(model, HesScale(gauss_newton=optimizer.defaults["gauss_newton"])):
        loss = loss_of(model)()
        loss.backward()
    optimizer.step()
    return loss


def torch_step(model, optimizer):
    """A closure of PyTorch's convention."""

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)()
        loss.backward()
        return loss

    return optimizer.step(closure)


STEPS = {
    "own block": block_step,
    "closure": lambda m, o: o.step(loss_of(m)),
    "closure with outputs": lambda m, o: o.step(lambda: (loss_of(m)(), m(X.to(m[0].weight)))),
    "torch's closure": torch_step,
}


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, other):
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
