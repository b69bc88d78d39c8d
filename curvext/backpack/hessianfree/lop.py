"""Products with transposed Jacobians."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def L_op(ys: Any, xs: Any, ws: Any, retain_graph: bool = True, detach: bool = True) -> tuple[Tensor, ...]:
    """Jᵀw, J = ∂ys/∂xs, one tensor for each of ``xs``; keeps its graph if ``detach=False``."""
    products = torch.autograd.grad(
        ys, xs, ws, create_graph=not detach, retain_graph=retain_graph or None, materialize_grads=True
    )
    return tuple(p.detach() for p in products) if detach else products


transposed_jacobian_vector_product = L_op
