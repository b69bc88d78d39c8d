"""Products with Jacobians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def R_op(ys: Any, xs: Any, vs: Any, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:
    """Jv, J = ∂ys/∂xs, one tensor for each of ``ys``: w -> Jᵀw is linear, and the transpose of its Jacobian is J."""
    ys, xs, vs = _several(ys), _several(xs), _several(vs)
    ws = [torch.zeros_like(y, requires_grad=True) for y in ys]
    rows = torch.autograd.grad(ys, xs, ws, create_graph=True, retain_graph=retain_graph, materialize_grads=True)
    pairs = [(row, v) for row, v in zip(rows, vs, strict=True) if row.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(y, requires_grad=False) for y in ys)
    rows, vs = zip(*pairs, strict=True)
    products = torch.autograd.grad(rows, ws, vs, create_graph=not detach, retain_graph=True, materialize_grads=True)
    return tuple(p.detach() for p in products) if detach else products


def _several(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


jacobian_vector_product = R_op
