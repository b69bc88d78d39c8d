"""A second-order optimizer in thirty lines: the step is the gradient over the damped Gauss-Newton diagonal."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from curvext.backpack import backpack, extend
from curvext.backpack.extensions import DiagGGNMC


class DiagGGNOptimizer(torch.optim.Optimizer):
    def __init__(self, parameters, step_size, damping):
        super().__init__(parameters, {"step_size": step_size, "damping": damping})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["step_size"] * p.grad / (p.diag_ggn_mc + group["damping"]))


def main(steps: int = 40) -> list[float]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    loss_function = nn.CrossEntropyLoss()
    extend(model)
    extend(loss_function)
    optimizer = DiagGGNOptimizer(model.parameters(), step_size=0.1, damping=0.1)
    losses = []
    for i in range(steps):
        batch = slice(32 * i % 1792, 32 * i % 1792 + 32)
        optimizer.zero_grad()
        loss = loss_function(model(x[batch]), y[batch])
        with backpack(DiagGGNMC()):
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
