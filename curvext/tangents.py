"""Products with the Jacobian of a graph that was run: tangents go up as t_y = J t_x, operation by operation.

A tangent is a direction in which a tensor moves. The rules of the wave ``"tangent"`` pass them, ``[V, *shape]``; by
default J t is the derivative in u of the node's Jᵀu, which is linear in u: two products with the node for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import registry
from .axes import BATCH, Axis
from .errors import CurvatureError
from .graph import Edge, Operation
from .hessians import LossHessian
from .rules.default import check_differentiable, quiet_vmap


@dataclass(frozen=True)
class Above:
    """What the factor wave carries in place of columns, for products: B itself, at the edges above.

    Values are B, the operation that it was found at, and where the samples are; ``None`` where B is not any sample's.
    """

    pieces: Mapping[Edge, tuple[LossHessian, Operation, Axis | None]]

    def __add__(self, other: Above) -> Above:
        return Above({**self.pieces, **other.pieces})

    def product(self, t: Mapping[Edge, Tensor]) -> dict[Edge, Tensor]:
        """B t, of tangents ``[V, *shape]`` at some of the edges."""
        found = {
            edge: (b, (BATCH, 1) if axis is None or b.whole else (axis, op.n_samples))
            for edge, (b, op, axis) in self.pieces.items()
            if edge in t
        }
        inner: Any = sum(b.inner(t[edge], *place) for edge, (b, place) in found.items())
        return {edge: b.spread(inner, *place) for edge, (b, place) in found.items()}


def pull(outputs: Sequence[Any], inputs: Sequence[Any], u: Sequence[Tensor]) -> list[Tensor | None]:
    """uᵀ ∂outputs/∂inputs for all V of u ``[V, *shape]``, the graph kept; one by one if PyTorch cannot batch them."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    if len(u[0]) > 1:
        try:
            with quiet_vmap():
                return list(torch.autograd.grad(outputs, inputs, u, is_grads_batched=True, **options))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation without a batched form, unless it fails one by one too
            pass
    rows = [torch.autograd.grad(outputs, inputs, row, **options) for row in zip(*u, strict=True)]
    return [_stacked(column) for column in zip(*rows, strict=True)]


def _stacked(rows: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [row for row in rows if row is not None]
    return torch.stack(present) if len(present) > 1 else present[0].unsqueeze(0) if present else None


def pass_tangents(op: Operation, t: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Σ_i J_i t_i at every output, of tangents ``[V, *shape]`` at the inputs (``None``: zero)."""
    rule = registry.find(op, "tangent")
    found = None if rule is None else rule.function(op, t)
    if rule is None or found is None:
        return _transposed(op, t)
    found = found if rule.outputs == "all" else [found, *[None] * (len(op.outputs) - 1)]
    return [t if t is None else t.to(y.dtype) for t, y in zip(found, op.outputs, strict=True)]


def _transposed(op: Operation, t: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The default."""
    try:
        with torch.enable_grad():
            u = [torch.ones(y.shape, dtype=y.dtype, device=y.device, requires_grad=True) for y in op.outputs]
            rows = op.vjp(*u)
            given = [(row, i, v) for i, (row, v) in enumerate(zip(rows, t, strict=True)) if v is not None]
            check_differentiable(op, [row for row, _, _ in given])
            pairs = [(op.reduced(row, i), v) for row, i, v in given if row is not None and row.requires_grad]
            return pull([y for y, _ in pairs], u, [v for _, v in pairs]) if pairs else [None] * len(u)
    except RuntimeError as error:
        raise CurvatureError(
            f"products with {op.kind} need a tangent rule, or a backward that can be differentiated ({error})"
        ) from error
