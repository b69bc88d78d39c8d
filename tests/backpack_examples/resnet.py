"""A residual network with a sum in its forward: per-sample gradients and the Gauss-Newton diagonal."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from curvext.backpack import backpack, extend
from curvext.backpack.extensions import BatchGrad, DiagGGNExact


class MyFirstResNet(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.conv3, self.relu3 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.flatten, self.linear = nn.Flatten(), nn.Linear(4 * 8 * 8, classes)

    def forward(self, x):
        x = self.relu1(self.conv1(x))
        residual = self.conv2(x)
        residual = self.conv3(self.relu2(residual))
        x = self.relu3(residual + x)
        return self.linear(self.flatten(x))


def main() -> dict[str, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:16] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels[:16])
    torch.manual_seed(0)
    results = {}

    model = extend(MyFirstResNet())  # first-order quantities need no conversion
    with backpack(BatchGrad()):
        nn.CrossEntropyLoss()(model(x), y).backward()
    for name, param in model.named_parameters():
        assert torch.allclose(param.grad_batch.sum(0), param.grad, atol=1e-6)
        results[f"{name} grad_batch"] = param.grad_batch

    torch.manual_seed(0)
    model = extend(MyFirstResNet().eval(), use_converter=True)
    loss_function = extend(nn.CrossEntropyLoss())
    with backpack(DiagGGNExact()):
        loss_function(model(x), y).backward()
    for name, param in model.named_parameters():
        results[f"{name} diag_ggn_exact"] = param.diag_ggn_exact
    return results


if __name__ == "__main__":
    print(*(f"{name}: {value.norm():.4g}" for name, value in main().items()), sep="\n")
