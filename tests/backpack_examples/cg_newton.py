"""Newton's method without matrices: conjugate gradients on block products of a curvature matrix."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from curvext.backpack import backpack, extend
from curvext.backpack.extensions import GGNMP


def cg(product, b, maxiter=10, tol=1e-4):
    """Solves A x = b with A given by products."""
    x, r = torch.zeros_like(b), b.clone()
    p, rs = r.clone(), (r * r).sum()
    for _ in range(maxiter):
        ap = product(p)
        alpha = rs / (p * ap).sum()
        x, r = x + alpha * p, r - alpha * ap
        before, rs = rs, (r * r).sum()
        if rs.sqrt() < tol * b.norm():
            break
        p = r + rs / before * p
    return x


class CGNOptimizer(torch.optim.Optimizer):
    def __init__(self, parameters, bp_extension, lr=0.1, damping=1e-2, maxiter=20):
        super().__init__(parameters, {"lr": lr, "damping": damping, "maxiter": maxiter})
        self.bp_extension = bp_extension

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                multiply = getattr(p, self.bp_extension.savefield)

                def damped(v, multiply=multiply, damping=group["damping"]):
                    return multiply(v.unsqueeze(0)).detach().squeeze(0) + damping * v

                p.data.sub_(group["lr"] * cg(damped, p.grad, group["maxiter"]))


def main(steps: int = 6) -> list[float]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10))
    model, loss_function = extend(model), extend(nn.CrossEntropyLoss())
    optimizer = CGNOptimizer(model.parameters(), GGNMP(), lr=0.3)
    losses = []
    for i in range(steps):
        batch = slice(256 * i, 256 * i + 256)
        optimizer.zero_grad()
        loss = loss_function(model(x[batch]), y[batch])
        with backpack(optimizer.bp_extension):
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print("losses", *(f"{loss:.4f}" for loss in losses))
    return losses


if __name__ == "__main__":
    main()
