"""Operators whose entries have a structure: products, inverses and moves in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..kronecker import Block, Eigenbasis, outer, times
from ..linalg import eigh
from .base import Operator, Readable
from .space import Space


class Structured(Operator):
    """An operator made of tensors, which move with it."""

    def _describe(self, shape: Sequence[int], like: Tensor, space: Space | None) -> None:
        self.shape, self.dtype, self.device = (shape[0], shape[1]), like.dtype, like.device
        if space is not None and (space.size, space.size) != self.shape:
            raise ValueError(f"{type(self).__name__} of shape {self.shape} for parameters of {space.size} entries")
        self.domain = self.image = space


class Identity(Structured):
    """I, ``[n, n]``; ``space`` may be given in place of n."""

    symmetric = True

    def __init__(
        self,
        n: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        space: Space | None = None,
    ):
        self._describe((n, n), torch.empty(0, dtype=dtype, device=device), space)

    def _apply(self, v: Tensor) -> Tensor:
        return v.clone()

    def inverse(self, damping: float = 0.0, solver: str | Callable[..., Any] = "cg", **options: Any) -> Operator:
        """I / (1 + δ)."""
        return self / (1 + damping)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        """For other vectors."""
        return Identity(self.shape[0], dtype or self.dtype, device or self.device, self.domain)


class Diagonal(Structured):
    """diag(d): ``d [n]``, or a mapping or sequence of tensors shaped like the parameters of ``space``."""

    symmetric = True

    def __init__(self, diagonal: Any, space: Space | None = None):
        if not isinstance(diagonal, Tensor):
            space = space or Space.of(
                diagonal if hasattr(diagonal, "keys") else {str(i): d for i, d in enumerate(diagonal)}
            )
            diagonal = space.flatten(diagonal)
        self.diagonal = _of_dimension(diagonal, 1, "Diagonal")
        self._describe((len(diagonal), len(diagonal)), diagonal, space)

    def _apply(self, v: Tensor) -> Tensor:
        return self.diagonal.unsqueeze(1) * v

    def inverse(self, damping: float = 0.0, solver: str | Callable[..., Any] = "cg", **options: Any) -> Operator:
        """diag(1 / (d + δ))."""
        return Diagonal(1 / _nonzero(self.diagonal + damping), self.domain)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        """With its entries moved."""
        return Diagonal(self.diagonal.to(device or self.device, dtype or self.dtype), self.domain)


class Dense(Structured, Readable):
    """A matrix ``[m, n]``. ``symmetric`` is the caller's word."""

    def __init__(self, matrix: Tensor, space: Space | None = None, symmetric: bool = False):
        self.matrix, self.symmetric = _of_dimension(matrix, 2, "Dense"), symmetric
        self._describe(matrix.shape, matrix, space)

    def _apply(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        return self.matrix.mT @ v

    def _entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.matrix[rows.unsqueeze(-1), columns.unsqueeze(-2)]

    def inverse(self, damping: float = 0.0, solver: str | Callable[..., Any] = "cg", **options: Any) -> Operator:
        """By an LU factorisation."""
        damped = self.matrix + damping * torch.eye(len(self.matrix), dtype=self.dtype, device=self.device)
        return Dense(torch.linalg.inv(damped), self.domain, self.symmetric)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        """With its entries moved."""
        return Dense(self.matrix.to(device or self.device, dtype or self.dtype), self.domain, self.symmetric)


class LowRank(Structured):
    """U diag(c) Uᵀ, with U ``[n, R]`` and c ``[R]`` (ones if not given): eigenvectors, or columns of a factor."""

    symmetric = True

    def __init__(self, factor: Tensor, values: Tensor | None = None, space: Space | None = None):
        self.factor = _of_dimension(factor, 2, "LowRank")
        self.values = factor.new_ones(factor.shape[1]) if values is None else values
        self._describe((len(factor), len(factor)), factor, space)

    def _apply(self, v: Tensor) -> Tensor:
        return self.factor @ (self.values.unsqueeze(1) * (self.factor.mT @ v))

    def inverse(self, damping: float = 0.0, solver: str | Callable[..., Any] = "cg", **options: Any) -> Operator:
        """(δI + U C Uᵀ)⁻¹ = (I - U (δI + C UᵀU)⁻¹ C Uᵀ) / δ (Woodbury); needs δ."""
        if not damping:
            raise CurvatureError("LowRank.inverse: a matrix of low rank has no inverse; pass damping")
        inner = self.values.unsqueeze(1) * (self.factor.mT @ self.factor)
        inner = torch.linalg.solve(inner + damping * torch.eye(len(inner), dtype=self.dtype, device=self.device),
                                   torch.diag(self.values))  # fmt: skip
        values, vectors = eigh((inner + inner.mT) / 2)
        unit = Identity(self.shape[0], self.dtype, self.device, self.domain)
        return (unit - LowRank(self.factor @ vectors, values, self.domain)) / damping

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        """With its entries moved."""
        there = (device or self.device, dtype or self.dtype)
        return LowRank(self.factor.to(*there), self.values.to(*there), self.domain)


class Kronecker(Structured):
    """A₁ ⊗ A₂ ⊗ ..., on vectors whose entries run over the last factor fastest.

    For a weight ``[O, I]``, flattened, ``Kronecker(G, A)`` is W ↦ G W Aᵀ. ``symmetric`` is the caller's word.
    """

    def __init__(self, *factors: Tensor, space: Space | None = None, symmetric: bool = True):
        self.factors = [_of_dimension(factor, 2, "Kronecker") for factor in factors]
        self.symmetric = symmetric
        self._describe([prod(f.shape[side] for f in factors) for side in (0, 1)], factors[0], space)

    def _apply(self, v: Tensor) -> Tensor:
        return _columns(self.factors, v)

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        return _columns([factor.mT for factor in self.factors], v)

    def inverse(self, damping: float = 0.0, solver: str | Callable[..., Any] = "cg", **options: Any) -> Operator:
        """⊗ Aᵢ⁻¹; with damping, Q diag(1 / (⊗λ + δ)) Qᵀ from the factors' eigenvectors, exactly."""
        if not damping:
            inverses = [torch.linalg.inv(factor) for factor in self.factors]
            return Kronecker(*inverses, space=self.domain, symmetric=self.symmetric)
        if not self.symmetric:
            return super().inverse(damping, solver, **options)
        values, vectors = zip(*(eigh(factor) for factor in self.factors), strict=True)
        basis = Eigenbasis(vectors, outer(values, 1), (self.shape[0],))
        return KroneckerBlock(basis.inverse(damping), self.domain)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        """With its entries moved."""
        moved = [factor.to(device or self.device, dtype or self.dtype) for factor in self.factors]
        return Kronecker(*moved, space=self.domain, symmetric=self.symmetric)


class KroneckerBlock(Structured):
    """A :class:`~curvext.Kronecker` or :class:`~curvext.Eigenbasis`, as the blocks of a curvature matrix are kept."""

    symmetric = True

    def __init__(self, block: Block, space: Space | None = None):
        self.matrix = block
        self._describe(block.shape, torch.empty(0, dtype=block.dtype, device=block.device), space)

    def _apply(self, v: Tensor) -> Tensor:
        return self.matrix @ v  # type: ignore[no-any-return]

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        """With its entries moved."""
        return KroneckerBlock(self.matrix.to(device or self.device, dtype or self.dtype), self.domain)


class BlockDiagonal(Structured):
    """Operators along the diagonal: a mapping from parameter names to square operators, or a sequence of any.

    A mapping's blocks belong to the parameters of those names, in its order; for a sequence ``space`` may say whose
    entries they run over.
    """

    def __init__(self, blocks: dict[str, Operator] | Sequence[Operator], space: Space | None = None):
        self.blocks = list(blocks.values()) if isinstance(blocks, dict) else list(blocks)
        if space is None and isinstance(blocks, dict):
            space = Space({name: _shape(name, block) for name, block in blocks.items()})
        self.symmetric = all(block.symmetric for block in self.blocks)
        first = self.blocks[0]
        for block in self.blocks:
            if block.dtype != first.dtype or block.device != first.device:
                raise ValueError("BlockDiagonal: blocks of several dtypes or devices")
        shape = [sum(block.shape[side] for block in self.blocks) for side in (0, 1)]
        self._describe(shape, torch.empty(0, dtype=first.dtype, device=first.device), space)

    def _apply(self, v: Tensor) -> Tensor:
        pieces = v.split([block.shape[1] for block in self.blocks])
        return torch.cat([block._apply(piece) for block, piece in zip(self.blocks, pieces, strict=True)])

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        pieces = v.split([block.shape[0] for block in self.blocks])
        return torch.cat([block._apply_adjoint(piece) for block, piece in zip(self.blocks, pieces, strict=True)])

    def inverse(self, damping: float = 0.0, solver: str | Callable[..., Any] = "cg", **options: Any) -> Operator:
        """Block by block."""
        return BlockDiagonal([block.inverse(damping, solver, **options) for block in self.blocks], self.domain)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        """With its blocks moved."""
        return BlockDiagonal([block.to(dtype, device) for block in self.blocks], self.domain)


def _columns(factors: Sequence[Tensor], v: Tensor) -> Tensor:
    """Every factor on its own axis of columns ``[n, K]``."""
    return times(factors, v.reshape(1, *(factor.shape[1] for factor in factors), v.shape[1])).flatten(0, -2)


def _of_dimension(tensor: Tensor, dim: int, what: str) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dim() != dim:
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{what}: expected a tensor of {dim} dimensions, got {got}")
    return tensor


def _nonzero(values: Tensor) -> Tensor:
    if bool((values == 0).any()):
        raise CurvatureError("inverse: the operator is singular; pass damping")
    return values


def _shape(name: str, block: Operator) -> torch.Size:
    if block.shape[0] != block.shape[1]:
        raise ValueError(f"BlockDiagonal: the block of {name!r} has shape {block.shape}, and is not square")
    if block.domain is not None and len(block.domain.shapes) == 1:
        return next(iter(block.domain.shapes.values()))
    return torch.Size([block.shape[0]])
