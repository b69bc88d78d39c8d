"""Dense definitions of first-order and Gauss-Newton quantities, sample by sample, from torch.autograd alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .reference import gauss_newton


def sample_gradients(losses: Callable[[], Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Every sample's gradient, ``[N, *P]`` for each parameter; ``losses()`` gives the samples' parts of the loss."""
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses()]
    return [
        torch.stack([torch.zeros_like(p) if row[i] is None else row[i] for row in rows])
        for i, p in enumerate(parameters)
    ]


def blocks(outputs: Callable[[], Tensor], loss: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The diagonal blocks ``[P, P]`` of JᵀBJ, one for each parameter."""
    matrix = gauss_newton(outputs, loss, parameters)
    places = torch.tensor([0, *[p.numel() for p in parameters]]).cumsum(0).tolist()
    return [matrix[a:b, a:b] for a, b in zip(places, places[1:], strict=False)]
