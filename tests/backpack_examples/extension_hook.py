"""Per-sample gradients that are reduced and deleted while the backward pass is still running."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from curvext.backpack import backpack, extend
from curvext.backpack.extensions import BatchGrad


def main() -> dict[str, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:32] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels[:32])
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)))
    loss_function = extend(nn.CrossEntropyLoss())

    def hook_mean_var(module):
        for param in module.parameters():
            gradients = param.grad_batch * len(x)
            param.mean_grad, param.var_grad = gradients.mean(0), gradients.var(0, unbiased=False)
            del param.grad_batch

    with backpack(BatchGrad(), extension_hook=hook_mean_var):
        loss_function(model(x), y).backward()

    results = {}
    for name, param in model.named_parameters():
        assert not hasattr(param, "grad_batch")
        assert torch.allclose(param.mean_grad, param.grad, atol=1e-6)
        results[f"{name} variance"] = param.var_grad
    print(f"mean variance {torch.cat([v.flatten() for v in results.values()]).mean():.3g}")
    return results


if __name__ == "__main__":
    main()
