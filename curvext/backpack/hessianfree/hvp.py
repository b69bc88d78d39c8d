"""Products with Hessians."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .rop import R_op


def hessian_vector_product(
    f: Tensor, params: Any, v: Any, grad_params: Any = None, detach: bool = True
) -> tuple[Tensor, ...]:
    """Hv, H the Hessian of the scalar ``f`` in ``params``, one tensor for each of them.

    Args:
        f: a scalar with its graph.
        params: a tensor or several.
        v: in the shapes of ``params``.
        grad_params: the gradient, if it is known already, made with ``create_graph=True``.
        detach: whether the product is cut off its own graph.
    """
    if grad_params is None:
        grad_params = torch.autograd.grad(f, params, create_graph=True, materialize_grads=True)
    return R_op(tuple(grad_params), params, v, detach=detach)
