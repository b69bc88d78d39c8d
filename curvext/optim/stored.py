"""The Gauss-Newton matrix by stored columns, for an optimizer: products without the graph.

Source: Wang, Tan & Lin 2020, section 4 ("Jacobian evaluation").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..operators.base import Operator
from ..operators.factored import FactoredGaussNewton
from ..operators.space import Space
from ..quantities import GGNFactor
from .point import Point


class StoredGaussNewton(Operator):
    """G ``[P, P]`` of a point, weight decay included, by its stored columns; counts products as the point does.

    Args:
        point: where.
        check: whether to compare a product with that of the graph.

    Raises:
        CurvatureError: if a product differs from that of the graph, as the loss is convex in something else than the
            closure's outputs.
    """

    symmetric = True

    def __init__(self, point: Point, check: bool = True):
        objective = self.objective = point.objective
        self.point, n = point, len(objective.start)
        self.shape, self.dtype, self.device = (n, n), objective.start.dtype, objective.start.device
        space = Space({str(i): p.shape for i, p in enumerate(objective.parameters)})
        columns: Any = point.quantities(GGNFactor()).ggn_factor
        self.stored = FactoredGaussNewton(columns, space)
        if check:
            self._check()

    def _check(self) -> None:
        v = torch.randn(self.shape[0], generator=torch.Generator().manual_seed(0)).to(self.objective.start)
        true = self.point.curvature("gauss_newton") @ v
        if not bool(torch.linalg.vector_norm(self @ v - true) <= 1e-3 * torch.linalg.vector_norm(true)):
            raise CurvatureError(
                "the stored Jacobian's Gauss-Newton matrix is split where the loss is last nonlinear, and the "
                "closure's outputs are elsewhere; use jacobian='products'"
            )

    def _apply(self, v: Tensor) -> Tensor:
        self.point.products += v.shape[1]
        return self.stored @ v + self.objective.decayed(v)
