"""Algebra of Kronecker products that are given as a list of factors, [A, B, ...] for A ⊗ B ⊗ ..."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from ...linalg import eigh

Factors = Sequence[Tensor]
Shift = float | Sequence[float] | None
TRUNCATE = 1e-8


def kfacs_to_mat(factors: Factors) -> Tensor:
    """The matrix A ⊗ B ⊗ ..., written out."""
    return reduce(torch.kron, factors).contiguous()


def two_kfacs_to_mat(a: Tensor, b: Tensor) -> Tensor:
    """A ⊗ B."""
    return kfacs_to_mat([a, b])


def kfac_mat_prod(factors: Factors) -> Callable[[Tensor], Tensor]:
    """The function v -> (A ⊗ B ⊗ ...) v, of a vector or of the columns of a matrix.

    Raises:
        ValueError: if a factor is no matrix; from the function, if sizes differ.
    """
    if any(factor.dim() != 2 for factor in factors):
        raise ValueError(f"Kronecker factors are matrices, got shapes {[tuple(f.shape) for f in factors]}")
    columns = [factor.shape[1] for factor in factors]

    def product(v: Tensor) -> Tensor:
        if v.dim() not in (1, 2) or len(v) != torch.Size(columns).numel():
            raise ValueError(
                f"expected a vector or matrix with {torch.Size(columns).numel()} rows, got {tuple(v.shape)}"
            )
        x = v.reshape(*columns, -1)
        for i, factor in enumerate(factors):
            x = torch.tensordot(factor, x, ([1], [i])).movedim(0, i)
        return x.reshape(-1, *v.shape[1:])

    return product


def apply_kfac_mat_prod(factors: Factors, mat: Tensor) -> Tensor:
    """(A ⊗ B ⊗ ...) mat."""
    return kfac_mat_prod(factors)(mat)


def inv_kfacs(factors: Factors, shift: Shift = None) -> list[Tensor]:
    """[(A + λ₁I)⁻¹, (B + λ₂I)⁻¹, ...] of symmetric factors, inverse eigenvalues cut at ±1e8.

    Args:
        factors: symmetric matrices.
        shift: λ, one for all or one for each; none by default.
    """
    shifts = list(shift) if isinstance(shift, Sequence) else [shift or 0.0] * len(factors)
    return [_inverse(factor, value) for factor, value in zip(factors, shifts, strict=True)]


def _inverse(factor: Tensor, shift: float) -> Tensor:
    values, vectors = eigh(factor)
    return vectors * (1 / (values + shift)).clamp(-1 / TRUNCATE, 1 / TRUNCATE) @ vectors.mT


def inv_kfac_mat_prod(factors: Factors, shift: Shift = None) -> Callable[[Tensor], Tensor]:
    """The function v -> [(A + λ₁I)⁻¹ ⊗ (B + λ₂I)⁻¹ ⊗ ...] v."""
    return kfac_mat_prod(inv_kfacs(factors, shift))


def apply_inv_kfac_mat_prod(factors: Factors, mat: Tensor, shift: Shift = None) -> Tensor:
    """[(A + λ₁I)⁻¹ ⊗ (B + λ₂I)⁻¹ ⊗ ...] mat."""
    return inv_kfac_mat_prod(factors, shift)(mat)
