"""DP-SGD: every sample's gradient is clipped, and noise is added to their sum."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from curvext.backpack import backpack, extend
from curvext.backpack.extensions import BatchGrad, BatchL2Grad


def make_broadcastable(v, x):
    """View of v [N] that multiplies x [N, ...]."""
    return v.reshape(-1, *[1] * (x.dim() - 1))


class DP_SGD(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1, max_norm=0.01, stddev=2.0):
        super().__init__(params, {"lr": lr, "max_norm": max_norm, "stddev": stddev})

    @torch.no_grad()
    def step(self):
        norms = torch.stack([p.batch_l2 for group in self.param_groups for p in group["params"]]).sum(0).sqrt()
        for group in self.param_groups:
            clip = torch.clamp_max(group["max_norm"] / norms, 1.0)
            for p in group["params"]:
                clipped = (p.grad_batch * make_broadcastable(clip, p.grad_batch)).sum(0)
                noise = group["stddev"] * group["max_norm"] * torch.randn_like(clipped)
                p.sub_(group["lr"] * (clipped + noise))


def main(steps: int = 20, stddev: float = 0.1) -> list[float]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    model, loss_function = extend(model), extend(nn.CrossEntropyLoss(reduction="mean"))
    optimizer = DP_SGD(model.parameters(), lr=1.0, stddev=stddev)
    losses = []
    for i in range(steps):
        batch = slice(64 * i, 64 * i + 64)
        optimizer.zero_grad()
        loss = loss_function(model(x[batch]), y[batch])
        with backpack(BatchGrad(), BatchL2Grad()):
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
