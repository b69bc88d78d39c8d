"""The Hessian B of a loss in the model's outputs, as the factors that the factor wave starts with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .axes import BATCH, Axis, back, front
from .errors import CurvatureError

ALL = slice(None)
TOLERANCE = 1e-4  # negative eigenvalues below this times the largest one are rounding, and more so in 16 bits


class LossHessian(ABC):
    """B at one tensor that holds the samples, as factors ``[V, *shape]`` with Σᵥ Sᵥ Sᵥᵀ = B_n within each sample.

    Factors are for a B without negative eigenvalues; :meth:`part` makes one of any.
    """

    whole: bool = False  # whether all samples are taken as one, as B has entries between them
    signed: ClassVar[str]  # the field whose signs are those of the eigenvalues

    def part(self, of: Callable[[Tensor], Tensor]) -> LossHessian:
        """The same with other eigenvalues: ``of`` is :func:`convex`, :func:`positive` or :func:`negative`."""
        return replace(self, **{self.signed: of(getattr(self, self.signed))})  # type: ignore[type-var]

    @property
    def is_zero(self) -> bool:
        """Whether nothing is there; it is looked at, unless it is traced."""
        return not tracing() and not bool(getattr(self, self.signed).any())

    @abstractmethod
    def columns(self, axis: Axis, n: int, part: slice = ALL) -> Tensor:
        """An exact factor: one column for every entry of a sample, ``[V, *shape]``; ``part`` of them."""

    def fewest(self, axis: Axis, n: int, part: slice = ALL) -> Tensor:
        """An exact factor of as few columns as are known to do."""
        return self.columns(axis, n, part)

    @abstractmethod
    def draws(self, m: int, axis: Axis, n: int, settings: Any) -> Tensor:
        """Random factors: E Σₘ Sₘ Sₘᵀ = B, ``[M, *shape]``."""

    def inner(self, t: Tensor, axis: Axis, n: int) -> Tensor:
        """What products need of ``t [V, *shape]``: Bt is :meth:`spread` of it, summed over tensors that share B."""
        return t

    @abstractmethod
    def spread(self, inner: Tensor, axis: Axis, n: int) -> Tensor:
        """B t, ``[V, *shape]``."""


def entries(shape: Sequence[int], axis: Axis, n: int, device: Any, without: int | None = None) -> tuple[Tensor, int]:
    """The number of every entry within its sample, ``[*shape]``, and how many there are; ``without`` one dimension."""
    kept = [1 if dim == without else size for dim, size in enumerate(shape)]
    split = front(torch.empty(kept, device="meta"), axis, n).shape[1:]
    numbers = torch.arange(prod(split), device=device).view(1, *split).expand(1 if axis is BATCH else n, *split)
    return back(numbers, axis, kept, n), prod(split)


def one_by_one(x: Tensor, axis: Axis, n: int, part: slice = ALL) -> Tensor:
    """Columns ``[V, *shape]``, each with one entry of ``x`` for every sample."""
    number, size = entries(x.shape, axis, n, x.device)
    every = torch.arange(size, device=x.device)[part].view(-1, *[1] * x.dim())
    return torch.where(number == every, x, x.new_zeros(()))


@dataclass
class DiagonalHessian(LossHessian):
    """B = diag(b)."""

    b: Tensor
    signed = "b"

    def columns(self, axis: Axis, n: int, part: slice = ALL) -> Tensor:
        return one_by_one(self.b.sqrt(), axis, n, part)

    def draws(self, m: int, axis: Axis, n: int, settings: Any) -> Tensor:
        root = self.b.div(m).sqrt().expand(m, *self.b.shape)
        return root * settings.signs(root)

    def spread(self, inner: Tensor, axis: Axis, n: int) -> Tensor:
        return self.b * inner


@dataclass
class SoftmaxHessian(LossHessian):
    """B = w (diag p - p pᵀ) along a dimension, p = softmax; w in the shape of p with that dimension 1."""

    p: Tensor
    w: Tensor
    dim: int
    signed = "w"

    def columns(self, axis: Axis, n: int, part: slice = ALL) -> Tensor:
        """S_c = √(w p_c) (e_c - p)."""
        root = (self.w * self.p).sqrt().movedim(self.dim, -1)
        p = self.p.movedim(self.dim, -1)

        def of(classes: slice) -> Tensor:
            mine = root[..., classes].unsqueeze(-2)
            return self._units(classes) * mine - p.unsqueeze(-1) * mine

        return self._spread(of, root.shape[-1], axis, n, part)

    def fewest(self, axis: Axis, n: int, part: slice = ALL) -> Tensor:
        """The Cholesky factor, which has C - 1 columns: with q_c = Σ_{i>c} p_i,

            S_c = √(w p_c q_c / q_{c-1}) (e_c - Σ_{i>c} p_i e_i / q_c).

        Source: Tanabe & Sagae, An exact Cholesky decomposition of the covariance of the multinomial, 1992.
        """
        p = self.p.movedim(self.dim, -1)
        if p.shape[-1] == 1:
            return self.columns(axis, n, part)
        tail = p.flip(-1).cumsum(-1).flip(-1)  # q_{c-1}
        above, q = tail[..., :-1], tail[..., 1:]
        tiny = torch.finfo(p.dtype).tiny
        root = (self.w.movedim(self.dim, -1) * p[..., :-1] * q / above.clamp(min=tiny)).sqrt()
        scale = root / q.clamp(min=tiny)

        def of(classes: slice) -> Tensor:
            below = (p.unsqueeze(-1) * scale[..., classes].unsqueeze(-2)).tril(-1 - classes.start)
            return self._units(classes) * root[..., classes].unsqueeze(-2) - below

        return self._spread(of, root.shape[-1], axis, n, part)

    def _units(self, classes: slice) -> Tensor:
        """e_c of some classes, ``[C, V]``."""
        size = self.p.shape[self.dim]
        rows = torch.arange(size, device=self.p.device)
        return (rows.unsqueeze(1) == rows[classes]).to(self.p.dtype)

    def _spread(self, of: Callable[[slice], Tensor], size: int, axis: Axis, n: int, part: slice) -> Tensor:
        """The columns of some classes, ``of(classes) [*, C, V]``, as ``[V, *shape]``.

        For T positions in a sample, which are independent, ``[V·T, *shape]``.
        """
        number, t = entries(self.p.shape, axis, n, self.p.device, self.dim % self.p.dim())
        start, stop, _ = part.indices(size * t)
        classes = slice(start // t, -(-stop // t))
        columns = of(classes).movedim(-1, 0).movedim(-1, 1 + self.dim % self.p.dim())
        if t == 1:
            return columns
        every = torch.arange(t, device=self.p.device).view(-1, *[1] * self.p.dim())
        columns = torch.where(number == every, columns.unsqueeze(1), columns.new_zeros(())).flatten(0, 1)
        return columns[start - classes.start * t : stop - classes.start * t]

    def draws(self, m: int, axis: Axis, n: int, settings: Any) -> Tensor:
        """√w (√p ∘ ε - p Σ √p ε)."""
        root = self.p.div(m).sqrt().expand(m, *self.p.shape)
        root = root * settings.signs(root)
        dim = self.dim % self.p.dim() + 1
        return self.w.sqrt() * (root - self.p * root.sum(dim, keepdim=True))

    def spread(self, inner: Tensor, axis: Axis, n: int) -> Tensor:
        """w (p t - p Σ p t)."""
        pulled = self.p * inner
        return self.w * (pulled - self.p * pulled.sum(self.dim % self.p.dim() + 1, keepdim=True))


@dataclass
class DenseHessian(LossHessian):
    """B_n = Σᵥ λᵥ uᵥ uᵥᵀ, by ``values [V, N]`` and ``vectors [V, N, *rest]``, samples in front, of ``shape``."""

    values: Tensor
    vectors: Tensor
    shape: Sequence[int]
    whole: bool = False
    signed = "values"

    def _roots(self, part: slice = ALL) -> Tensor:
        roots = self.values[part].sqrt()
        return self.vectors[part] * roots.view(*roots.shape, *[1] * (self.vectors.dim() - 2))

    def columns(self, axis: Axis, n: int, part: slice = ALL) -> Tensor:
        return back(self._roots(part), axis, self.shape, n, 1)

    def draws(self, m: int, axis: Axis, n: int, settings: Any) -> Tensor:
        signs = settings.signs(self.values.new_empty(m, *self.values.shape))
        drawn = torch.einsum("vn...,mvn->mn...", self._roots(), signs) / m**0.5
        return back(drawn, axis, self.shape, n, 1)

    def inner(self, t: Tensor, axis: Axis, n: int) -> Tensor:
        """λᵥ ⟨uᵥ, t⟩, ``[T, V, N]``."""
        t = front(t, axis, n, 1).flatten(2)
        return self.values * torch.einsum("vnd,tnd->tvn", self.vectors.flatten(2), t)

    def spread(self, inner: Tensor, axis: Axis, n: int) -> Tensor:
        return back(torch.einsum("tvn,vn...->tn...", inner, self.vectors), axis, self.shape, n, 1)


def tracing() -> bool:
    """Whether values cannot be looked at."""
    return get_proxy_mode() is not None


def positive(b: Tensor) -> Tensor:
    """Without the negative ones."""
    return b.clamp(min=0)


def negative(b: Tensor) -> Tensor:
    """Without the positive ones, as positive numbers: B = its positive part - its negative part."""
    return (-b).clamp(min=0)


def convex(b: Tensor) -> Tensor:
    """As they are, if none is negative beyond rounding."""
    rounding = max(TOLERANCE, 4 * torch.finfo(b.dtype).eps)
    if not tracing() and b.numel() and bool(b.min() < -rounding * b.max().clamp(min=0)):
        raise not_convex()
    return b.clamp(min=0)


def not_convex() -> CurvatureError:
    """What is raised where B has negative eigenvalues."""
    return CurvatureError(
        "the Gauss-Newton matrix splits the loss at its topmost nonlinear operation, which is this one, and the loss "
        "is not convex there, so its Hessian has no real factor. If the loss is convex in the model's output z, mark "
        "that: z = curvext.output(model(x)). HesScale, DiagHessian and HMP need no convexity"
    )
