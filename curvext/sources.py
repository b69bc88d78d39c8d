"""Where the factor wave starts: the Hessian B of the loss at the topmost nonlinear operation under it, and its factor.

Everything above that operation is linear in its output y = f(x), so B = ∂²⟨g, f(x)⟩/∂x² with g = ∂L/∂y: class
weights, ignored targets, smoothing, reductions and loss scaling are all in g, and need no care. If trained
weights come before any nonlinear operation, the loss is linear in the model's output (it may have kinks), and B = 0.

B is block diagonal over the samples; a loss that mixes them is found out, and B taken whole. Rules of the wave
``"source"`` give it in closed form; where ``f`` goes entry by entry it is the second term of equation (2); any other
operation is differentiated twice (:class:`Bending`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from . import registry
from .diagonal import bends, pass_diagonal
from .errors import CurvatureError
from .graph import Operation
from .hessians import DenseHessian, DiagonalHessian, LossHessian, entries, tracing
from .rules.default import UNBATCHED, others_fixed, quiet_vmap
from .samples import BATCH, Axis, front

MOST = 4096  # entries of a sample for which a dense Hessian is formed
MEET = 1e-3  # relative size of entries between samples that is not rounding
Places = dict[Any, Axis]


def joint(op: Operation) -> list[list[int]]:
    """The inputs that the model's output may be: those that hold samples; if none does, all."""
    groups = op.groups
    return [group for group in groups if op.axes_in[group[0]] is not None] or groups


def may_start(op: Operation) -> bool:
    """Whether the gradient is needed to tell if an operation is nonlinear in its inputs, taken together."""
    return not op.above and (bends(op) or (len(op.edges) > 1 and len(joint(op)) > 1))


def starts(op: Operation, reached: bool) -> bool:
    """Whether an operation's own curvature belongs to the loss's Hessian, given whether curvature reached it already.

    It does at the topmost nonlinear operation, and where many entries become one number: in ``norm(z) ** 2`` the
    number is no model's output.
    """
    return not op.above and (not reached or _reduces(op))


def _reduces(op: Operation) -> bool:
    needed = [meta for meta, need in zip(op.inputs, op.needs, strict=True) if need]
    one = len(op.outputs) == len(needed) == prod(op.outputs[0].shape) == 1
    return one and (op.summed or op.axes_out[0] is BATCH) and prod(needed[0].shape) > 1


def is_layer(op: Operation) -> bool:
    """Whether samples meet trained weights here. What is below is the model: if nothing bent above, B = 0."""
    meets = any([axis is not None for axis in op.axes_out])
    return meets and not op.above and any([n and a is None for n, a in zip(op.needs, op.axes_in, strict=True)])


def loss_hessian(op: Operation, g: Sequence[Tensor | None]) -> dict[int, LossHessian]:
    """B = ∂²⟨g, f(x)⟩/∂x² at the inputs of an operation; empty if it bends nothing."""
    if not may_start(op) or not any(v is not None for v in g):
        return {}
    rule = registry.find(op, "source")
    if rule is not None and not op.coincident:
        return {i: hessian for i, hessian in rule.function(op, g).items() if op.needs[i]}
    groups = joint(op)
    separable = registry.find(op, "diagonal")
    if len(groups) == 1 and separable is not None and separable.separable:
        bend = pass_diagonal(op, g, [None] * len(g))
        i = groups[0][0]
        found = None if i >= len(bend) else bend[i]
        if found is None:
            return {}
        return {i: DiagonalHessian(op.reduced(found, i))}
    return dense_hessian(op, g, groups)


def dense_hessian(op: Operation, g: Sequence[Tensor | None], groups: list[list[int]]) -> dict[int, LossHessian]:
    """B of every sample by differentiating the node's backward, with its eigenvectors."""
    parts: dict[int, Tensor] = {}
    with torch.enable_grad(), twice_differentiable():
        outs = op.vjp(*(None if v is None else v.detach().requires_grad_(op.is_python) for v in g))
        for group in groups:
            given = [op.reduced(out, i) for i in group if (out := outs[i]) is not None]
            if given:
                parts[group[0]] = sum(given[1:], start=given[0])

    def product(j: int, i: int, v: Tensor, batched: bool) -> Tensor | None:
        with others_fixed(op, i):
            return derivative(parts[j], GradientEdge(*op.edges[i]), v, batched and op.kind not in UNBATCHED)

    axes = {i: op.axes_in[i] for i in parts}
    return Bending(parts, axes, op.n_samples, product).hessians(alone=not op.summed)


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
        values, vectors = torch.linalg.eigh(rows.movedim(1, 0))
        split = vectors.movedim(-1, 0).split([part.numel() // n for part in self.parts.values()], -1)  # [V, N, D]
        whole = n == 1 and any(axis is not BATCH for axis in self.axes.values())
        found: dict[Any, LossHessian] = {}
        for (i, part), piece in zip(self.parts.items(), split, strict=True):
            shape = front(part, places[i], n).shape[1:]
            found[i] = DenseHessian(values.mT, piece.reshape(*piece.shape[:2], *shape), part.shape, whole)
        return found
