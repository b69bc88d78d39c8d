"""Kronecker products A ⊗ B as matrices over the entries of a parameter, and matrices in a Kronecker eigenbasis.

Entries are in row-major order, so that (A ⊗ B) vec(V) = vec(A V Bᵀ) for V ``[rows of A, rows of B]``. A factor is a
matrix ``[d, d]``; a vector ``[d]``, which stands for the diagonal matrix; or ``[G, d, d]``, one matrix for each of G
groups of entries that have no curvature in common (grouped convolutions). All matrices are symmetric and positive
semi-definite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .errors import CurvatureError
from .linalg import eigh

VERSION = 1


class Block(ABC):
    """A symmetric matrix over the entries of a tensor, or of a weight and its bias together."""

    like: tuple[int, ...]
    bias_along: int | None

    @property
    @abstractmethod
    def dims(self) -> tuple[int, ...]:
        """Groups, then the size of each factor: ``[G, d1, d2, ...]``."""

    @property
    @abstractmethod
    def tensors(self) -> Sequence[Tensor | None]:
        """What it consists of."""

    @abstractmethod
    def _with(self, tensors: Sequence[Tensor | None]) -> Any:
        """The same of other tensors."""

    @abstractmethod
    def _apply(self, v: Tensor) -> Tensor:
        """The product with columns ``[G, d1, d2, ..., K]``."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns: both the number of entries P."""
        return prod(self.dims), prod(self.dims)

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        return self._first.device

    @property
    def _first(self) -> Tensor:
        return next(t for t in self.tensors if t is not None)

    def __matmul__(self, v: Any) -> Any:
        """The product with a vector.

        Args:
            v: a tensor of the parameter's shape, flat ``[P]``, or columns ``[P, K]``; for a weight with a bias also the
                pair of them.

        Returns:
            The same form, shape and dtype as ``v``.

        Raises:
            ValueError: if ``v`` has none of these shapes.
        """
        if isinstance(v, (tuple, list)):
            return self.split(self @ self.join(*v))
        size = self.shape[0]
        if tuple(v.shape) not in (self.like, self.dims, self.dims[1:], (size,)) and tuple(v.shape[:-1]) != (size,):
            raise ValueError(
                f"{type(self).__name__}: expected a tensor of shape {self.like}, ({size},) or ({size}, K), got "
                f"{tuple(v.shape)}"
            )
        columns = v.reshape(*self.dims, -1).to(torch.promote_types(v.dtype, self.dtype))
        return self._apply(columns).reshape(v.shape).to(v.dtype)

    def join(self, weight: Tensor, bias: Tensor) -> Tensor:
        """A weight and a bias in their shapes as one tensor ``[G, d1, d2]``, the bias as last column, or last row."""
        if self.bias_along is None:
            raise ValueError(f"{type(self).__name__}: this is the matrix of one tensor, not of a weight and a bias")
        dim = self.bias_along
        sizes = [size - (k == dim) for k, size in enumerate(self.dims)]
        return torch.cat([weight.reshape(sizes), bias.reshape([1 if k == dim else n for k, n in enumerate(self.dims)])],
                         dim)  # fmt: skip

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`join`."""
        assert self.bias_along is not None
        weight, bias = joined.view(self.dims).split([self.dims[self.bias_along] - 1, 1], self.bias_along)
        return weight.reshape(self.like), bias.reshape(-1)

    def dense(self) -> Tensor:
        """The matrix ``[P, P]``."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """On another device, or in another dtype; arguments as for :meth:`torch.Tensor.to`."""
        return self._with([None if t is None else t.to(*args, **kwargs) for t in self.tensors])

    def state_dict(self) -> dict[str, Any]:
        """All of it as tensors and plain values; :meth:`load_state_dict` is the inverse."""
        tensors = list(self.tensors)
        return {"version": VERSION, "kind": type(self).__name__, "tensors": tensors,
                "like": self.like, "bias_along": self.bias_along}  # fmt: skip

    @classmethod
    def load_state_dict(cls, state: Mapping[str, Any]) -> Any:
        """The matrix that :meth:`state_dict` was taken of.

        Raises:
            ValueError: if it is of another class, or of a later version.
        """
        if state["kind"] != cls.__name__ or state["version"] > VERSION:
            raise ValueError(
                f"{cls.__name__}: cannot load the state of a {state['kind']} of version {state['version']} (this is "
                f"version {VERSION})"
            )
        return cls._from(state["tensors"], tuple(state["like"]), state["bias_along"])

    @classmethod
    @abstractmethod
    def _from(cls, tensors: Sequence[Tensor | None], like: tuple[int, ...], bias_along: int | None) -> Any:
        """Made of these."""


@dataclass(frozen=True, eq=False)
class Kronecker(Block):
    """A ⊗ B ⊗ ..., or a block-diagonal matrix of such products, one for each group.

    Args:
        factors: see the module; ``p.kfac`` is such a list.
        like: shape of the parameter; that of the factors by default.
        bias_along: for a weight and its bias together: where the bias is appended to ``[G, d1, d2]``, 2 for a column
            and 1 for a row; ``like`` is then the weight's shape.
    """

    factors: tuple[Tensor, ...]
    like: tuple[int, ...] = ()
    bias_along: int | None = None

    def __post_init__(self) -> None:
        shapes = [tuple(f.shape) for f in self.factors]
        square = all(len(shape) in (1, 2, 3) and shape[-1] == shape[-2:][0] for shape in shapes)
        if not shapes or not square or len({shape[0] for shape in shapes if len(shape) == 3}) > 1:
            raise ValueError(f"Kronecker: expected factors [d], [d, d] or [G, d, d] with one G, got {shapes}")
        object.__setattr__(self, "factors", tuple(self.factors))
        object.__setattr__(self, "like", tuple(self.like) or self.dims[self.dims[0] == 1 :])

    @classmethod
    def later(cls, make: Callable[[], Sequence[Tensor]], like: tuple[int, ...], bias_along: int | None) -> Kronecker:
        """One whose factors are made when they are first asked for."""
        made = object.__new__(cls)
        made.__dict__.update(_make=make, like=like, bias_along=bias_along)
        return made

    def __getattr__(self, name: str) -> Any:
        if name != "factors":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.__dict__["factors"] = tuple(self.__dict__.pop("_make")())
        return self.factors

    @property
    def dims(self) -> tuple[int, ...]:
        groups = [len(f) for f in self.factors if f.dim() == 3]
        return (groups[0] if groups else 1, *[f.shape[-1] for f in self.factors])

    @property
    def tensors(self) -> Sequence[Tensor | None]:
        return self.factors

    def _with(self, tensors: Sequence[Tensor | None]) -> Kronecker:
        return replace(self, factors=tuple(tensors))  # type: ignore[arg-type]

    @classmethod
    def _from(cls, tensors: Sequence[Tensor | None], like: tuple[int, ...], bias_along: int | None) -> Kronecker:
        return cls(tuple(tensors), like, bias_along)  # type: ignore[arg-type]

    def _apply(self, v: Tensor) -> Tensor:
        return times(self.factors, v)

    def __mul__(self, scalar: float | Tensor) -> Kronecker:
        return replace(self, factors=(self.factors[0] * scalar, *self.factors[1:]))

    __rmul__ = __mul__

    def lerp(self, other: Kronecker, weight: float) -> Kronecker:
        """Running average, factor by factor: (1 - weight) A + weight A', as is usual; not that of the products."""
        pairs = zip(self.factors, other.factors, strict=True)
        return replace(self, factors=tuple([torch.lerp(a, b.to(a), weight) for a, b in pairs]))

    def trace(self) -> Tensor:
        """Sum of the diagonal, a scalar."""
        return outer([_diagonal(f).sum(-1, keepdim=True) for f in self.factors], self.dims[0]).sum()

    def diag(self) -> Tensor:
        """The diagonal, ``[P]``."""
        return outer([_diagonal(f) for f in self.factors], self.dims[0]).flatten()

    def eigh(self) -> Eigenbasis:
        """The same matrix by the eigenvectors of its factors and all products of their eigenvalues."""
        pairs = [(f, None) if f.dim() == 1 else eigh(f) for f in self.factors]
        values = outer([values.clamp(min=0) for values, _ in pairs], self.dims[0])
        return Eigenbasis(tuple([vectors for _, vectors in pairs]), values, self.like, self.bias_along)

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log det(A ⊗ B + damping I), a scalar."""
        return self.eigh().logdet(damping)

    def inverse(self, damping: float | Tensor = 0.0, pi: bool = True) -> Block:
        """The damped inverse.

        Args:
            damping: λ, in the scaling of the matrix.
            pi: divide λ among the factors, (A + π√λ I)⁻¹ ⊗ (B + √λ/π I)⁻¹ with π² the ratio of the mean eigenvalues of
                A and B: a Kronecker product again, by Cholesky. Otherwise (A ⊗ B + λI)⁻¹ exactly, by eigenvectors.

        Raises:
            CurvatureError: if a factor is singular, and not damped.

        Source: Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, 2015, 6.3.
        """
        if not pi:
            return self.eigh().inverse(damping)
        shifts = _shares(self.factors, damping)
        return replace(self, factors=tuple([_inverted(f, s) for f, s in zip(self.factors, shifts, strict=True)]))

    def solve(self, v: Any, damping: float | Tensor = 0.0, pi: bool = True) -> Any:
        """``inverse(damping, pi) @ v``."""
        return self.inverse(damping, pi) @ v


@dataclass(frozen=True, eq=False)
class Eigenbasis(Block):
    """(Q₁ ⊗ Q₂) diag(values) (Q₁ ⊗ Q₂)ᵀ with orthogonal Q.

    Args:
        vectors: eigenvectors as columns, ``[d, d]`` or ``[G, d, d]``; ``None`` stands for the identity.
        values: ``[G, d1, d2, ...]``.
        like: shape of the parameter.
        bias_along: as for :class:`Kronecker`.
    """

    vectors: tuple[Tensor | None, ...]
    values: Tensor
    like: tuple[int, ...]
    bias_along: int | None = None

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def tensors(self) -> Sequence[Tensor | None]:
        return (*self.vectors, self.values)

    def _with(self, tensors: Sequence[Tensor | None]) -> Eigenbasis:
        return self._from(tensors, self.like, self.bias_along)

    @classmethod
    def _from(cls, tensors: Sequence[Tensor | None], like: tuple[int, ...], bias_along: int | None) -> Eigenbasis:
        *vectors, values = tensors
        assert values is not None
        return cls(tuple(vectors), values, like, bias_along)

    def turned(self, v: Tensor, forward: bool) -> Tensor:
        return times([q if q is None or forward else q.mT for q in self.vectors], v)

    def _apply(self, v: Tensor) -> Tensor:
        return self.turned(self.turned(v, False) * self.values.unsqueeze(-1), True)

    def __mul__(self, scalar: float | Tensor) -> Eigenbasis:
        return replace(self, values=self.values * scalar)

    __rmul__ = __mul__

    def trace(self) -> Tensor:
        """Sum of the eigenvalues, a scalar."""
        return self.values.sum()

    def diag(self) -> Tensor:
        """The diagonal, ``[P]``."""
        return times([q if q is None else q.square() for q in self.vectors], self.values.unsqueeze(-1)).flatten()

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log det(· + damping I), a scalar."""
        return (self.values + damping).log().sum()

    def power(self, exponent: float, damping: float | Tensor = 0.0) -> Eigenbasis:
        """(· + damping I) to a power: ``power(-0.5, λ) @ ε`` is a draw of covariance (· + λI)⁻¹ if ε is normal."""
        return replace(self, values=(self.values + damping) ** exponent)

    def inverse(self, damping: float | Tensor = 0.0) -> Eigenbasis:
        """(· + damping I)⁻¹, exactly.

        Raises:
            CurvatureError: if it is singular, and not damped.
        """
        if bool(((self.values + damping) <= 0).any()):
            raise CurvatureError(f"the matrix is singular with damping {damping}: an inverse needs more damping")
        return self.power(-1, damping)

    def solve(self, v: Any, damping: float | Tensor = 0.0) -> Any:
        """``inverse(damping) @ v``."""
        return self.inverse(damping) @ v


def times(factors: Sequence[Tensor | None], v: Tensor) -> Tensor:
    """Every factor, square or not, applied to its dimension of ``[G, d1, d2, ..., K]``; ``None``: the identity."""
    for dim, factor in enumerate(factors, 1):
        v = v if factor is None else _along(factor.to(v.dtype), v, dim)
    return v


def _along(factor: Tensor, v: Tensor, dim: int) -> Tensor:
    if factor.dim() == 1:
        return v * factor.view(-1, *[1] * (v.dim() - dim - 1))
    moved = v.movedim(dim, 1)
    return (factor @ moved.flatten(2)).unflatten(2, moved.shape[2:]).movedim(1, dim)


def _diagonal(factor: Tensor) -> Tensor:
    return factor if factor.dim() == 1 else factor.diagonal(dim1=-2, dim2=-1)


def outer(vectors: Sequence[Tensor], groups: int) -> Tensor:
    """All products of the entries of ``[d]`` or ``[G, d]``: ``[G, d1, d2, ...]``."""
    product = vectors[0].new_ones(groups)
    for vector in vectors:
        product = product.unsqueeze(-1) * vector.view(-1, *[1] * (product.dim() - 1), vector.shape[-1])
    return product


def _shares(factors: Sequence[Tensor], damping: float | Tensor) -> list[Tensor]:
    """λ divided among the factors, in proportion to their mean eigenvalues: the product of the shares is λ."""
    means = torch.stack(torch.broadcast_tensors(*[_diagonal(f).mean(-1) for f in factors]))
    means = torch.where((means > 0).all(0), means, 1)
    return list(means * (damping / means.prod(0)) ** (1 / len(factors)))


def _inverted(factor: Tensor, shift: Tensor) -> Tensor:
    if factor.dim() == 1:
        if bool((factor + shift <= 0).any()):
            raise CurvatureError(f"a factor with {len(factor)} rows is singular: its inverse needs more damping")
        return 1 / (factor + shift)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    root, failed = torch.linalg.cholesky_ex(factor + shift[..., None, None] * eye)
    if bool(failed.any()):
        raise CurvatureError(f"a factor with {factor.shape[-1]} rows is singular: its inverse needs more damping")
    return torch.cholesky_inverse(root)
