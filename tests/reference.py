"""Slow and obvious definitions, from torch.autograd.functional alone, and what is compared with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvext import extend


def equation_2(function: Callable[..., Tensor], inputs: Sequence[Tensor], i: int, g: Tensor, h: Tensor) -> Tensor:
    """(J∘J)ᵀ h + diag(Σₖ gₖ ∂²yₖ/∂x²) for y = function(x), with respect to inputs[i]."""
    x = inputs[i].detach()

    def of_x(x: Tensor) -> Tensor:
        return function(*inputs[:i], x, *inputs[i + 1 :])

    j = torch.autograd.functional.jacobian(of_x, x).reshape(h.numel(), x.numel())
    bend = torch.autograd.functional.hessian(lambda x: (g * of_x(x)).sum(), x).reshape(x.numel(), x.numel())
    return (h.reshape(-1) @ j**2 + bend.diagonal()).view(x.shape)


def hessian(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """The Hessian of loss() in all parameters together, [P, P]."""
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])
    return _jacobian(flat, parameters)


def _jacobian(values: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    rows = [torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for v in values]
    dense = [
        [torch.zeros_like(p) if r is None else r.to_dense() for r, p in zip(row, parameters, strict=True)]
        for row in rows
    ]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in dense])


def split(diagonal: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A vector over all parameters, in their shapes."""
    pieces = diagonal.split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def hessian_diagonal(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The diagonal of the Hessian of loss(), in the parameters' shapes."""
    return split(hessian(loss, parameters).diagonal(), parameters)


def gauss_newton(
    outputs: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """JᵀBJ in all parameters together, [P, P]: B the Hessian of loss(z) in the outputs z."""
    z = outputs()
    b = torch.autograd.functional.hessian(loss, z.detach()).reshape(z.numel(), z.numel())
    j = _jacobian(z.flatten(), parameters)
    return j.T @ b @ j


def gauss_newton_diagonal(
    outputs: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """The diagonal of the Gauss-Newton matrix, in the parameters' shapes."""
    return split(gauss_newton(outputs, loss, parameters).diagonal(), parameters)


def chain(
    layers: Sequence[tuple[Callable[..., Tensor], Sequence[Tensor]]], x: Tensor, loss: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """HesScale of every parameter of a chain x -> f(*parameters, x) -> ... -> loss, layer by layer by equation (2)."""
    xs = [x.detach()]
    for function, parameters in layers:
        xs.append(function(*(p.detach() for p in parameters), xs[-1]))
    h = torch.autograd.functional.hessian(loss, xs[-1]).reshape(xs[-1].numel(), -1).diagonal().view_as(xs[-1])
    g = torch.autograd.functional.jacobian(loss, xs[-1])
    results: list[Tensor] = []
    for (function, parameters), x in zip(reversed(layers), reversed(xs[:-1]), strict=True):
        inputs = [p.detach() for p in parameters] + [x]
        hs = [equation_2(function, inputs, i, g, h) for i in range(len(inputs))]
        g = torch.autograd.functional.vjp(lambda x, f=function, ps=inputs[:-1]: f(*ps, x), x, g)[1]
        results, h = hs[:-1] + results, hs[-1]
    return results


def close(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    """Tensors, or several of them, are equal to rounding."""
    got, want = (v if isinstance(v, Tensor) else list(v) for v in (got, want))
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def computed(quantity: Any, model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> list[Tensor]:
    """A quantity of every parameter, by one block."""
    with extend(model, quantity, **options) as curvature:
        loss().backward()
    return list(curvature[quantity.savefield].values())
