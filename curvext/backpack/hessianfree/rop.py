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
    used = [(y, w) for y, w in zip(ys, ws, strict=True) if y.requires_grad]
    rows = torch.autograd.grad(
        [y for y, _ in used], xs, [w for _, w in used], retain_graph, create_graph=True, allow_unused=True
    )
    pairs = [(row, v) for row, v in zip(rows, vs, strict=True) if row is not None and row.requires_grad]
    rows, vs = [row for row, _ in pairs], [v for _, v in pairs]
    return torch.autograd.grad(rows, ws, vs, retain_graph=True, create_graph=not detach, materialize_grads=True)


def _several(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


jacobian_vector_product = R_op
