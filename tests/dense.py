"""Dense definitions of first-order and Gauss-Newton quantities, sample by sample, from torch.autograd alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from curvext import (
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

from .reference import _jacobian, gauss_newton

FIRST_ORDER = (BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance(), BatchDotGrad())
EXACT = (*FIRST_ORDER, DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), GGNBlock())


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def sample_gradients(losses: Callable[[], Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Every sample's gradient, ``[N, *P]`` for each parameter; ``losses()`` gives the samples' parts of the loss."""
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses()]
    return [
        torch.stack([torch.zeros_like(p) if row[i] is None else row[i].to_dense() for row in rows])
        for i, p in enumerate(parameters)
    ]


def places(parameters: Sequence[Tensor]) -> list[slice]:
    """Where each parameter's entries are in a matrix over all of them."""
    ends = torch.tensor([0, *[p.numel() for p in parameters]]).cumsum(0).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def blocks(
    outputs: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """The diagonal blocks ``[P, P]`` of JᵀBJ, one for each parameter."""
    matrix = gauss_newton(outputs, loss, parameters)
    return [matrix[place, place] for place in places(parameters)]


def sample_blocks(
    outputs: Callable[[], Any], losses: Callable[[Any], Tensor], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """The same for every sample's part of the loss: ``[N, P, P]``; the outputs may be several tensors."""
    several = outputs()
    tensors = [several] if isinstance(several, Tensor) else list(several)
    sizes = [z.numel() for z in tensors]
    z = torch.cat([z.flatten() for z in tensors])

    def of_flat(z: Tensor) -> Tensor:
        pieces = [piece.view(t.shape) for piece, t in zip(z.split(sizes), tensors, strict=True)]
        return losses(pieces[0] if isinstance(several, Tensor) else pieces)

    n, j, z0 = len(of_flat(z)), _jacobian(z, parameters), z.detach()
    b = torch.stack([torch.autograd.functional.hessian(lambda z, i=i: of_flat(z)[i], z0) for i in range(n)])
    return [j[:, place].T @ b @ j[:, place] for place in places(parameters)]


def check(
    model: nn.Module, x: Any, total: Callable[[Any], Tensor], parts: Callable[[Any], Tensor], **options: Any
) -> None:
    """Every exact quantity of every parameter against its definition.

    Args:
        x: the model's input, or a tuple of them.
        total: the loss from the model's outputs, as users write it.
        parts: the same as one number for each sample.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def outputs() -> Any:
        return model(*x) if isinstance(x, tuple) else model(x)

    with extend(model, *EXACT, **options):
        total(outputs()).backward()
    near(parts(outputs()).sum(), total(outputs()))
    gradients = sample_gradients(lambda: parts(outputs()), parameters)
    for p, g, block in zip(parameters, gradients, sample_blocks(outputs, parts, parameters), strict=True):
        near(p.grad_batch, g)
        near(p.batch_l2, g.reshape(len(g), -1).square().sum(1))
        near(p.sum_grad_squared, g.square().sum(0))
        near(p.variance, g.var(0, unbiased=False))
        near(p.batch_dot, g.reshape(len(g), -1) @ g.reshape(len(g), -1).T)
        near(p.ggn_block, block.sum(0))
        near(p.diag_ggn_exact, block.sum(0).diagonal().view_as(p))
        near(p.diag_ggn_exact_batch, block.diagonal(0, 1, 2).reshape(-1, *p.shape))
        columns = p.sqrt_ggn_exact.unsqueeze(2).flatten(2).movedim(1, 0)
        near(columns.mT @ columns, block)
