"""What a linear operator is: a shape, a dtype, a device and products; and the algebra between operators.

A subclass gives ``_apply`` on columns ``[n, K]``, and ``_apply_adjoint`` unless it is symmetric; all else follows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from .space import Space


class Operator(ABC):
    """A real linear map ``[m, n]``, known by its products.

    ``A @ v`` takes a vector ``[n]``, columns ``[n, K]``, a mapping or a sequence of tensors shaped like the parameters
    (or with columns behind, ``[*shape, K]``), which is answered in the same form, or another operator.
    ``A + B``, ``A - B``, ``2 * A``, ``A @ B``, ``A.T``, ``A.inverse(damping)``, ``A.block("fc1")`` are operators.

    Attributes:
        shape: ``(m, n)``.
        domain, image: names and shapes of what goes in and comes out, where they are parameters; else ``None``.
        symmetric: whether the operator is its own adjoint.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    domain: Space | None = None
    image: Space | None = None
    symmetric: bool = False

    @abstractmethod
    def _apply(self, v: Tensor) -> Tensor:
        """Columns ``[n, K]`` to columns ``[m, K]``, K >= 1."""

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        """Columns ``[m, K]`` to columns ``[n, K]``."""
        if self.symmetric:
            return self._apply(v)
        raise NotImplementedError(f"{type(self).__name__} has no adjoint products")

    def __matmul__(self, v: Any) -> Any:
        if isinstance(v, Operator):
            return Product(self, v)
        if isinstance(v, Tensor):
            return self._times(v)
        if self.domain is None:
            raise TypeError(f"{type(self).__name__} @ {type(v).__name__}: only tensors; its domain has no parameters")
        product = self._times(self.domain.flatten(v))
        return product if self.image is None else self.image.like(v, product)

    def _times(self, v: Tensor) -> Tensor:
        """Vector or columns, checked."""
        m, n = self.shape
        if v.dim() not in (1, 2) or v.shape[0] != n:
            raise ValueError(f"{type(self).__name__} of shape ({m}, {n}) @ tensor of shape {tuple(v.shape)}")
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"{type(self).__name__} is {self.dtype} on {self.device}, the vector {v.dtype} on {v.device}; "
                "convert one of them: operator.to(dtype=..., device=...)"
            )
        if v.dim() == 1:
            return self._apply(v.unsqueeze(1)).squeeze(1)
        return self._apply(v) if v.shape[1] else v.new_zeros(m, 0)

    @property
    def T(self) -> Operator:
        """The adjoint."""
        return self if self.symmetric else Adjoint(self)

    @property
    def adjoint(self) -> Operator:
        """The same as ``T``."""
        return self.T

    def __add__(self, other: Operator) -> Operator:
        return Sum(self, other) if isinstance(other, Operator) else NotImplemented

    def __sub__(self, other: Operator) -> Operator:
        return Sum(self, -other) if isinstance(other, Operator) else NotImplemented

    def __mul__(self, factor: float | Tensor) -> Operator:
        if isinstance(factor, Operator):
            raise TypeError("operators are composed by A @ B; A * B is for numbers")
        return Scaled(self, float(factor))

    __rmul__ = __mul__

    def __truediv__(self, factor: float | Tensor) -> Operator:
        return self * (1 / factor)

    def __neg__(self) -> Operator:
        return self * -1

    def damped(self, damping: float) -> Operator:
        """A + δ I."""
        from .structured import Identity

        return self + damping * Identity(self.shape[0], self.dtype, self.device, self.domain) if damping else self

    def inverse(self, damping: float = 0.0, solver: str | Callable[..., Any] = "cg", **options: Any) -> Operator:
        """(A + δ I)⁻¹: in closed form where the structure has one, else by a solver.

        Args:
            damping: δ.
            solver: the name of a function in ``curvext.solvers``, or a callable ``solver(operator, b, **options)`` that
                returns x with ``operator @ x = b``, or a result with ``.x`` (and ``.converged``, if it has one).
        """
        return Inverse(self.damped(damping), solver, **options)

    def block(self, rows: str | Sequence[str], columns: str | Sequence[str] | None = None) -> Operator:
        """The part of the parameters whose names match globs: ``A.block("fc1")``, ``A.block("*.weight", "*.bias")``.

        ``columns`` is ``rows`` if not given.
        """
        return Block(self, rows, columns)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        """The operator for vectors of another dtype or device; products are converted there and back."""
        return Converted(self, dtype or self.dtype, torch.device(device or self.device))

    def to_dense(self, chunk: int = 256) -> Tensor:
        """All entries ``[m, n]``, ``chunk`` columns at a time; for tests and small models."""
        m, n = self.shape
        dense = torch.empty(m, n, dtype=self.dtype, device=self.device)
        for start in range(0, n, chunk):
            width = min(chunk, n - start)
            unit = torch.zeros(n, width, dtype=self.dtype, device=self.device)
            unit[start : start + width].fill_diagonal_(1)
            dense[:, start : start + width] = self._times(unit)
        return dense

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator``: NumPy arrays in and out."""
        linalg = optional("scipy.sparse.linalg", "to_scipy")
        forward, backward = _on_arrays(self), _on_arrays(self.T)
        dtype = torch.empty(0, dtype=_numpy_dtype(self.dtype)).numpy().dtype
        return linalg.LinearOperator(
            self.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=dtype
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {self.dtype}, {self.device})"


class Readable(Operator):
    """An operator whose entries are to be had without products. A subclass gives ``_entries``."""

    def entries(self, rows: slice | Tensor, columns: slice | Tensor) -> Tensor:
        """A[rows, columns], by places in the flat order.

        Args:
            rows, columns: slices, or indices ``[*B, r]`` and ``[*B, c]``: that gives ``[*B, r, c]``.
        """
        m, n = self.shape
        return self._entries(_places(rows, m, self.device), _places(columns, n, self.device))

    @abstractmethod
    def _entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The same for indices."""

    def block_times(self, rows: Tensor, columns: Tensor, v: Tensor) -> Tensor:
        """``A.entries(rows, columns) @ v``, for indices and v ``[*B, c, K]``."""
        return self._entries(rows, columns) @ v


def _places(index: slice | Tensor, size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device)[index] if isinstance(index, slice) else index.to(device)


def optional(module: str, what: str) -> Any:
    """Import a module that only ``what`` needs."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"{what} needs {package}: pip install {package}") from error


def _numpy_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float64, torch.float32, torch.float16) else torch.float32


def _on_arrays(operator: Operator) -> Callable[[Any], Any]:
    def product(array: Any) -> Any:
        v = torch.as_tensor(array).to(operator.device, operator.dtype)
        return (operator @ v).detach().cpu().to(_numpy_dtype(operator.dtype)).numpy()

    return product


def _same(a: Operator, b: Operator, what: str) -> None:
    if a.dtype != b.dtype or a.device != b.device:
        raise ValueError(f"{what} of operators in {a.dtype} on {a.device} and {b.dtype} on {b.device}")


class _Derived(Operator):
    """An operator made of others."""

    def _describe(self, like: Operator, shape: Sequence[int], image: Space | None, domain: Space | None) -> None:
        self.shape, self.dtype, self.device = (shape[0], shape[1]), like.dtype, like.device
        self.image, self.domain = image, domain


class Sum(_Derived):
    """A + B + ..."""

    def __init__(self, *terms: Operator):
        self.terms: list[Operator] = [t for term in terms for t in (term.terms if isinstance(term, Sum) else [term])]
        first = self.terms[0]
        for term in self.terms:
            _same(first, term, "sum")
            if term.shape != first.shape:
                raise ValueError(f"sum of operators of shapes {first.shape} and {term.shape}")
        self.symmetric = all(term.symmetric for term in self.terms)
        spaces = [[s for t in self.terms if (s := getattr(t, side)) is not None] for side in ("image", "domain")]
        self._describe(first, first.shape, *(found[0] if found else None for found in spaces))

    def _apply(self, v: Tensor) -> Tensor:
        return sum((t._apply(v) for t in self.terms[1:]), start=self.terms[0]._apply(v))

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        return sum((t._apply_adjoint(v) for t in self.terms[1:]), start=self.terms[0]._apply_adjoint(v))


class Scaled(_Derived):
    """c A."""

    def __init__(self, operator: Operator, factor: float):
        self.operator, self.factor, self.symmetric = operator, factor, operator.symmetric
        self._describe(operator, operator.shape, operator.image, operator.domain)

    def _apply(self, v: Tensor) -> Tensor:
        return self.operator._apply(v) * self.factor

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        return self.operator._apply_adjoint(v) * self.factor


class Product(_Derived):
    """A B."""

    def __init__(self, left: Operator, right: Operator):
        _same(left, right, "product")
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"product of operators of shapes {left.shape} and {right.shape}")
        self.left, self.right = left, right
        self._describe(left, (left.shape[0], right.shape[1]), left.image, right.domain)

    def _apply(self, v: Tensor) -> Tensor:
        return self.left._apply(self.right._apply(v))

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        return self.right._apply_adjoint(self.left._apply_adjoint(v))


class Adjoint(_Derived):
    """Aᵀ."""

    def __init__(self, operator: Operator):
        self.operator = operator
        self._describe(operator, operator.shape[::-1], operator.domain, operator.image)

    def _apply(self, v: Tensor) -> Tensor:
        return self.operator._apply_adjoint(v)

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        return self.operator._apply(v)

    @property
    def T(self) -> Operator:
        """The operator itself."""
        return self.operator


class Converted(_Derived):
    """A for vectors of another dtype or on another device."""

    def __init__(self, operator: Operator, dtype: torch.dtype, device: torch.device):
        self.operator, self.symmetric = operator, operator.symmetric
        self._describe(operator, operator.shape, operator.image, operator.domain)
        self.dtype, self.device = dtype, device

    def _apply(self, v: Tensor) -> Tensor:
        inner = self.operator
        return inner._apply(v.to(inner.device, inner.dtype)).to(self.device, self.dtype)

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        inner = self.operator
        return inner._apply_adjoint(v.to(inner.device, inner.dtype)).to(self.device, self.dtype)


class Block(_Derived):
    """The rows and columns of A that belong to some of the parameters."""

    def __init__(self, operator: Operator, rows: str | Sequence[str], columns: str | Sequence[str] | None = None):
        if operator.image is None or operator.domain is None:
            raise TypeError(f"block of {type(operator).__name__}: its rows or columns do not belong to parameters")
        self.operator = operator
        image, self.rows = operator.image.part(rows)
        domain, self.columns = operator.domain.part(rows if columns is None else columns)
        self.symmetric = operator.symmetric and image == domain
        self._describe(operator, (image.size, domain.size), image, domain)

    def _apply(self, v: Tensor) -> Tensor:
        return self.operator._apply(_padded(v, self.columns, self.operator.shape[1]))[self.rows.to(v.device)]

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        return self.operator._apply_adjoint(_padded(v, self.rows, self.operator.shape[0]))[self.columns.to(v.device)]


def _padded(v: Tensor, places: Tensor, n: int) -> Tensor:
    return v.new_zeros(n, v.shape[1]).index_copy(0, places.to(v.device), v)


class Inverse(_Derived):
    """A⁻¹ by a solver, one column after the other."""

    def __init__(self, operator: Operator, solver: str | Callable[..., Any] = "cg", **options: Any):
        if operator.shape[0] != operator.shape[1]:
            raise ValueError(f"inverse of an operator of shape {operator.shape}")
        self.operator, self.options, self.symmetric = operator, options, operator.symmetric
        self.solver = _solver(solver) if isinstance(solver, str) else solver
        self._describe(operator, operator.shape, operator.domain, operator.image)

    def _apply(self, v: Tensor) -> Tensor:
        return self._solved(self.operator, v)

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        return self._solved(self.operator.T, v)

    def _solved(self, operator: Operator, v: Tensor) -> Tensor:
        return torch.stack([self._solution(self.solver(operator, b, **self.options)) for b in v.unbind(1)], 1)

    @staticmethod
    def _solution(result: Any) -> Tensor:
        if isinstance(result, Tensor):
            return result
        if not bool(getattr(result, "converged", True)):
            raise CurvatureError(
                "inverse: the solver did not converge, so this is no inverse. Allow it more iterations or a larger "
                "tolerance in inverse(..., **options), add damping, or call the solver itself for its best vector"
            )
        return result.x  # type: ignore[no-any-return]


def _solver(name: str) -> Callable[..., Any]:
    solvers = import_module("curvext.solvers")
    if not callable(getattr(solvers, name, None)):
        raise ValueError(f"inverse: curvext.solvers has no {name!r}")
    return getattr(solvers, name)  # type: ignore[no-any-return]
