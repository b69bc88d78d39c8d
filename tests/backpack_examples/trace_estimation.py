"""Hutchinson's estimate of the trace of the Hessian's diagonal blocks, beside the exact one."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from curvext.backpack import backpack, extend
from curvext.backpack.extensions import HMP, DiagHessian
from curvext.backpack.hessianfree.hvp import hessian_vector_product


def rademacher(*shape):
    return 2.0 * torch.randint(0, 2, shape) - 1


def main(samples: int = 500) -> dict[str, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:32] / 16, dtype=torch.float32), torch.tensor(labels[:32])
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(64, 10), nn.Sigmoid(), nn.Linear(10, 10)))
    loss_function = extend(nn.CrossEntropyLoss())

    with backpack(DiagHessian(), HMP()):
        loss_function(model(x), y).backward()
    exact = sum(p.diag_h.sum() for p in model.parameters())

    # many vectors at once, with the products of the block
    estimate = torch.tensor(0.0)
    for p in model.parameters():
        v = rademacher(samples, *p.shape)
        estimate += (v * p.hmp(v).detach()).sum() / samples

    # one at a time, by autograd
    parameters = list(model.parameters())
    loss = loss_function(model(x), y)
    total = torch.tensor(0.0)
    for _ in range(samples):
        vs = [rademacher(*p.shape) for p in parameters]
        total += sum((v * hv).sum() for v, hv in zip(vs, hessian_vector_product(loss, parameters, vs), strict=True))

    print(f"trace {exact:.4f}, by blocks {estimate:.4f}, by products {total / samples:.4f}")
    return {"exact": exact, "blocks": estimate, "products": total / samples}


if __name__ == "__main__":
    main()
