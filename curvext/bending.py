"""The Hessian of a loss in a few tensors by differentiating their gradients, and its eigenvectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .axes import BATCH, Axis, front
from .errors import CurvatureError
from .hessians import DenseHessian, LossHessian, entries, tracing
from .linalg import eigh
from .rules.default import quiet_vmap

MOST = 4096  # entries of a sample for which a dense Hessian is formed
MEET = 1e-3  # relative size of entries between samples that is not rounding
Places = dict[Any, Axis]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within, what PyTorch cannot differentiate twice is refused in words."""
    try:
        yield
    except CurvatureError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise CurvatureError(
            "the Hessian of the loss is needed here, but there is no rule of the wave 'source' for it (docs/rules.md) "
            f"and PyTorch cannot differentiate it twice ({error})"
        ) from error


def derivative(part: Tensor, edge: GradientEdge, v: Tensor, batched: bool) -> Tensor | None:
    """vᵀ ∂part/∂x for rows v, together if PyTorch can: ``[V, *shape]``."""
    if not part.requires_grad:
        return None

    def rows(v: Tensor, together: bool) -> Tensor | None:
        options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": together}
        return torch.autograd.grad(part, edge, v, **options)[0]  # type: ignore[arg-type]

    with twice_differentiable(), quiet_vmap():
        try:
            return rows(v, True) if batched else _stacked([rows(w, False) for w in v])
        except RuntimeError:  # an operation without a batching rule, unless it fails one by one too
            return _stacked([rows(w, False) for w in v])


def _stacked(rows: list[Tensor | None]) -> Tensor | None:
    return torch.stack([row for row in rows if row is not None]) if rows and rows[0] is not None else None


@dataclass
class Bending:
    """The Hessian in several tensors together, from their gradients.

    Args:
        parts: the gradient at every tensor, differentiable.
        axes: where the tensors hold the samples; ``None`` if all are one.
        n: the number of samples.
        product: ``(j, i, v, batched)`` gives vᵀ ∂parts[j]/∂x_i for rows v.
    """

    parts: dict[Any, Tensor]
    axes: Mapping[Any, Axis | None]
    n: int
    product: Callable[[Any, Any, Tensor, bool], Tensor | None]

    def hessians(self, alone: bool) -> dict[Any, LossHessian]:
        """B of every sample, or of all together where they meet; ``alone``: it is known that they do not."""
        if not any(part.requires_grad for part in self.parts.values()):
            return {}
        if None in self.axes.values() or (not alone and tracing()):
            return self._factored(*self._as_one())
        places: Places = dict(self.axes)  # type: ignore[arg-type]
        n = 1 if BATCH in places.values() else self.n
        rows = self._rows(places, n)
        if n > 1 and not alone and self._meet(rows, places, n):
            return self._factored(*self._as_one())
        return self._factored(rows, places, n)

    def _as_one(self) -> tuple[Tensor, Places, int]:
        places: Places = dict.fromkeys(self.parts, BATCH)
        return self._rows(places, 1), places, 1

    def _rows(self, places: Places, n: int) -> Tensor:
        """Rows of every sample's Hessian, ``[D, N, D]``."""
        size = sum(part.numel() // n for part in self.parts.values())
        if size > MOST:
            raise CurvatureError(
                f"the Hessian of the loss would have {size} rows {'in all' if n == 1 else 'a sample'} (at most {MOST} "
                "are formed), and there is no rule of the wave 'source' for it (docs/rules.md)"
            )
        return torch.cat([self._of_entries(j, places, n) for j in self.parts])

    def _of_entries(self, j: Any, places: Places, n: int) -> Tensor:
        """Those of the entries of tensor j, one entry of every sample at a time: ``[D_j, N, D]``."""
        like = self.parts[j]
        number, size = entries(like.shape, places[j], n, like.device)
        basis = (number == torch.arange(size, device=number.device).view(-1, *[1] * number.dim())).to(like.dtype)
        found = {i: self.product(j, i, basis.expand(size, *like.shape), True) for i in self.parts}
        return self._laid(found, places, n, size)

    def _laid(self, found: dict[Any, Tensor | None], places: Places, n: int, v: int) -> Tensor:
        """Derivatives ``[V, *shape]`` in every tensor as ``[V, N, D]``."""
        full = {i: part.new_zeros(v, *part.shape) if (w := found[i]) is None else w for i, part in self.parts.items()}
        return torch.cat([front(w.detach(), places[i], n, 1).reshape(v, n, -1) for i, w in full.items()], 2)

    def _meet(self, rows: Tensor, places: Places, n: int) -> bool:
        """Whether B has entries between samples: then its product with a random vector is not that of the blocks."""
        generator = torch.Generator().manual_seed(0)
        v = {j: torch.rand(1, *p.shape, generator=generator, dtype=torch.float64).to(p) for j, p in self.parts.items()}
        got: Any = 0
        for j in self.parts:
            got = got + self._laid({i: self.product(j, i, v[j], False) for i in self.parts}, places, n, 1)
        want = torch.einsum("dne,vnd->vne", rows, self._laid(dict(v), places, n, 1))
        return bool((got - want).abs().max() > MEET * got.abs().max())

    def _factored(self, rows: Tensor, places: Places, n: int) -> dict[Any, LossHessian]:
        if not tracing() and not bool(rows.any()):
            return {}
        values, vectors = eigh(rows.movedim(1, 0))
        split = vectors.movedim(-1, 0).split([part.numel() // n for part in self.parts.values()], -1)  # [V, N, D]
        whole = places != self.axes
        found: dict[Any, LossHessian] = {}
        for (i, part), piece in zip(self.parts.items(), split, strict=True):
            shape = front(part, places[i], n).shape[1:]
            found[i] = DenseHessian(values.mT, piece.reshape(*piece.shape[:2], *shape), part.shape, whole)
        return found
