"""The Gauss-Newton matrix by what every sample's outputs owe to the layers, stored: products without the graph.

For the weight of a linear map, sample n and output v this is the wave s at the map's output and its input x, with
S_nv = Σ_t s ⊗ x and G = Σ_nv S_nv S_nvᵀ: a product is one with the inputs and one with the waves.

Source: Wang, Tan & Lin 2020, section 4 ("Jacobian evaluation").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..factor import at_target
from ..operators.base import Operator
from ..persample import Dense, Outer, PerSample
from ..quantities.base import Quantity, Target
from ..quantities.readings import arrived
from ..quantities.waves import Factor
from ..rows import Rows
from ..wave import Wave
from .point import Point

Parts = Mapping[Any, PerSample]  # by where in the loss the columns come from


@dataclass(frozen=True)
class Stored(Quantity):
    """What reaches every parameter from the factor wave, as it is."""

    savefield = "curvext_stored"

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (Factor("fewest"),)

    def read(self, target: Target, *waves: Any) -> Parts:
        arrived(waves[0], target).owned("a stored Jacobian")
        return {source: _laid(at_target(v, target.axis, target.n)) for source, v in (waves[0] or {}).items()}

    def add(self, a: Any, b: Any) -> Any:
        raise CurvatureError("a stored Jacobian is of one backward pass")

    def zero(self, target: Target) -> Parts:
        return {}


class StoredGaussNewton(Operator):
    """G ``[P, P]`` of a point, weight decay included, by its stored parts; counts products as the point does.

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
        found = point.quantities(Stored())[Stored.savefield]
        self.parts: list[Parts] = [found.get(str(i), {}) for i in range(len(objective.parameters))]  # type: ignore[misc]
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
        return torch.stack([self._product(column) for column in v.mT], 1) + self.objective.decayed(v)

    def _product(self, v: Tensor) -> Tensor:
        inner: dict[Any, Any] = {}
        for parts, piece in zip(self.parts, self.objective.split(v), strict=True):
            for source, part in parts.items():
                inner[source] = inner.get(source, 0) + columns(part, piece)
        found = torch.zeros_like(v)
        for parts, piece in zip(self.parts, self.objective.split(found), strict=True):
            for source, part in parts.items():
                piece += sums(part, inner[source])
        return found


def _laid(part: PerSample) -> PerSample:
    """Samples first in memory, so that products of matrices run over columns and entries."""
    if isinstance(part, (Outer, Rows)):
        return replace(part, s=part.s.transpose(0, 1).contiguous().transpose(0, 1))
    return Dense(part.dense().transpose(0, 1).contiguous().transpose(0, 1))


def columns(part: PerSample, v: Tensor) -> Tensor:
    """⟨S_vn, v⟩ ``[V, N]``."""
    if isinstance(part, Outer):
        groups, o, i = part.s.shape[2], part.s.shape[4], part.x.shape[3]
        matrix = v.reshape(groups, i, o) if part.flipped else v.reshape(groups, o, i).mT
        return _inner(part.s, part.x @ matrix)
    if isinstance(part, Rows):
        return _inner(part.s, v[part.index])
    return part.dense().unsqueeze(2).flatten(2) @ v.flatten()


def sums(part: PerSample, u: Tensor) -> Tensor:
    """Σ_vn u_vn S_vn, in the parameter's shape."""
    if isinstance(part, Outer):
        wave = _sum(part.s, u).permute(1, 3, 0, 2).flatten(2)  # G O NT
        matrix = wave @ part.x.transpose(0, 1).flatten(1, 2)
        return (matrix.mT if part.flipped else matrix).reshape(part.shape)
    if isinstance(part, Rows):
        wave = _sum(part.s, u).flatten(0, 1)
        return wave.new_zeros(part.shape).index_add(0, part.index.flatten(), wave)
    return _sum(part.dense(), u).sum(0)


def _inner(s: Tensor, y: Tensor) -> Tensor:
    """The inner products of ``[V, N, ...]`` and ``[N, ...]``, ``[V, N]``."""
    return (s.flatten(2).transpose(0, 1) @ y.flatten(1).unsqueeze(2)).squeeze(2).mT


def _sum(s: Tensor, u: Tensor) -> Tensor:
    """Σ_v u s, ``[N, ...]``."""
    found = u.mT.unsqueeze(1) @ s.unsqueeze(2).flatten(2).transpose(0, 1)
    return found.reshape(s.shape[1:])
