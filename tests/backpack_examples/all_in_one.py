"""Every quantity of one batch, as BackPACK's overview example asks for them."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from curvext.backpack import backpack, extend
from curvext.backpack.extensions import (
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SqrtGGNMC,
    SumGradSquared,
    Variance,
)


def main() -> dict[str, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:32] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    y = torch.tensor(labels[:32])
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    lossfunc = extend(nn.CrossEntropyLoss())
    results = {}

    extensions = [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), DiagGGNExact(), DiagHessian(),
                  BatchDiagGGNExact(), BatchDiagHessian(), KFLR(), KFRA()]  # fmt: skip
    for extension in extensions:
        loss = lossfunc(model(x), y)
        with backpack(extension):
            loss.backward()
        for name, param in model.named_parameters():
            value = getattr(param, extension.savefield)
            for i, part in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                print(f"{name:10} .grad {tuple(param.grad.shape)} .{extension.savefield} {tuple(part.shape)}")
                results[f"{name} {extension.savefield} {i}"] = part

    # several at once; these are random, or a root that is not unique
    with backpack(DiagGGNMC(mc_samples=2), BatchDiagGGNMC(), KFAC(mc_samples=1), SqrtGGNExact(), SqrtGGNMC()):
        lossfunc(model(x), y).backward()
    for name, param in model.named_parameters():
        assert param.diag_ggn_mc.shape == param.shape and param.diag_ggn_mc_batch.shape == (32, *param.shape)
        assert len(param.kfac) == param.dim() and param.sqrt_ggn_mc.shape == (1, 32, *param.shape)
        results[f"{name} of roots"] = torch.einsum("vn...,vn...->...", param.sqrt_ggn_exact, param.sqrt_ggn_exact)

    # products with blocks are functions of several vectors at a time
    for extension in (HMP(), GGNMP(), PCHMP()):
        with backpack(extension):
            lossfunc(model(x), y).backward()
        for name, param in model.named_parameters():
            product = getattr(param, extension.savefield)
            results[f"{name} {extension.savefield}"] = product(torch.ones(3, *param.shape)).detach()
    return results


if __name__ == "__main__":
    main()
