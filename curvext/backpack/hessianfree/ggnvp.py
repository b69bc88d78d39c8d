"""Products with Gauss-Newton matrices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .hvp import hessian_vector_product
from .lop import L_op
from .rop import R_op


def ggn_vector_product(loss: Tensor, output: Tensor, model: nn.Module, v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """JᵀBJv over the trained parameters of ``model``; see :func:`ggn_vector_product_from_plist`."""
    return ggn_vector_product_from_plist(loss, output, [p for p in model.parameters() if p.requires_grad], v)


def ggn_vector_product_from_plist(
    loss: Tensor, output: Tensor, plist: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """JᵀBJv, J the Jacobian of ``output`` in ``plist``, B the Hessian of ``loss`` in ``output``."""
    return L_op(output, plist, hessian_vector_product(loss, output, R_op(output, plist, v)))
