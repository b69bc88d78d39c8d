"""Symmetric factorisation of A + δI without transposes, and what it gives: inverse, log det, samples, diagonals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..linalg import eigh
from ..operators.structured import Structured
from .levels import add_product, decomposed, nodes, pairs
from .update import folded

if TYPE_CHECKING:
    from .hodlr import HierarchicalOperator

Root = tuple[int, Tensor, Tensor]  # level, Q [size, k], s [pairs, k]


class Factorization(Structured):
    """(A + δI)⁻¹ as an operator, of a :class:`HierarchicalOperator` A; by ``A.factor(δ)``.

        A + δI = W Wᵀ,   W⁻¹ = M₀^-½ M₁^-½ ... M_L^-½ W_leaf⁻¹

    with M = I + [0, Q₁ s Q₂ᵀ; Q₂ s Q₁ᵀ, 0] for every level, and I + Q μ Qᵀ for the part of low rank: their roots are
    known in closed form, and s < 1, μ > -1 says that A + δI is positive definite. Costs O(R² n log² n), an application
    O(R n log n); computes in float64. Another shift needs another factorisation, and no products with A.

    Source: Ambikasaran, O'Neil & Singh 2014.

    Attributes:
        shift: δ.
        added: what ``compensate`` put on top of it.
    """

    symmetric = True
    added: float = 0.0

    def __init__(self, operator: HierarchicalOperator, shift: float):
        self.tree, self.shift = operator.tree, shift
        self._describe(operator.shape, operator.leaves, operator.domain)
        self.values, self.leaves = _leaves(operator, shift)
        self.roots: list[Root] = []  # from fine to coarse
        for level in range(len(operator.levels), 0, -1):
            f = self._inward(operator.levels[level - 1].double())
            q1, s, q2 = decomposed(f, level)
            _positive(1 - s, shift)
            self.roots.append((level, torch.stack([q1, q2], 1).reshape(f.shape[0], -1), s))
        self.top, self.weights = _top(self._inward(operator.basis.double()), operator.values.double())
        _positive(1 + self.weights, shift)

    def _leaf(self, v: Tensor) -> Tensor:
        """W_leaf⁻¹ v; it is symmetric."""
        return (self.leaves @ v.reshape(*self.values.shape, -1)).flatten(0, 1)

    def _inward(self, v: Tensor) -> Tensor:
        """W⁻¹ v, without the part of low rank."""
        v = self._leaf(v)
        for root in self.roots:
            _apply_root(root, v)
        return v

    def _outward(self, v: Tensor, below: int) -> Tensor:
        """W⁻ᵀ v, of the finest ``below`` levels alone; ``v`` is overwritten."""
        for root in reversed(self.roots[:below]):
            _apply_root(root, v)
        return self._leaf(v)

    def _across(self, v: Tensor, power: float) -> Tensor:
        return v.addmm_(self.top, (((1 + self.weights) ** power) - 1).unsqueeze(1) * (self.top.mT @ v))

    def _apply(self, v: Tensor) -> Tensor:
        x = self._inward(self.tree.enter(v.double()))
        return self.tree.leave(self._outward(self._across(x, -1.0), len(self.roots))).to(self.dtype)

    def solve(self, b: Tensor) -> Tensor:
        """(A + δI)⁻¹ b, for b ``[n]`` or ``[n, K]``."""
        return self @ b  # type: ignore[no-any-return]

    def logdet(self) -> Tensor:
        """log det(A + δI)."""
        pairwise = sum(torch.log1p(-(s**2)).sum() for _, _, s in self.roots)
        return self.values.log().sum() + pairwise + torch.log1p(self.weights).sum()

    def sample(self, draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Columns ``[n, draws]`` of N(0, (A + δI)⁻¹): W⁻ᵀ z."""
        home = self.device if generator is None else generator.device
        z = torch.randn(self.tree.size, draws, generator=generator, dtype=torch.float64, device=home).to(self.device)
        return self.tree.leave(self._outward(self._across(z, -0.5), len(self.roots))).to(self.dtype)

    def diagonal(self) -> Tensor:
        """The diagonal of (A + δI)⁻¹, ``[n]``: exact, in O(R² n log² n)."""
        entries = self.leaves.square().sum(2).flatten()
        for below, (level, q, s) in enumerate(self.roots):
            columns = pairs(self._outward(q.clone(), below).square(), level)
            entries = entries + (columns @ (s**2 / (1 - s**2))[:, None, :, None]).flatten()
        across = self._outward(self.top.clone(), len(self.roots)).square() @ (1 / (1 + self.weights) - 1)
        return self.tree.leave((entries + across).unsqueeze(1)).squeeze(1).to(self.dtype)

    def trace(self) -> Tensor:
        """tr (A + δI)⁻¹."""
        return self.diagonal().sum()

    def effective_dimension(self) -> Tensor:
        """tr A (A + δI)⁻¹ = n - δ tr (A + δI)⁻¹."""
        return self.shape[0] - (self.shift + self.added) * self.trace()


def factorize(operator: HierarchicalOperator, shift: float, compensate: bool = False) -> Factorization:
    """A + δI = W Wᵀ; where the blocks alone are not positive definite, with the part of low rank put into them first.

    Args:
        operator: A.
        shift: δ.
        compensate: where A + δI is not positive definite, add the least multiple of I (to a third) that makes it so and
            say so in ``added``. If A approximates a positive matrix, that is at most its error in spectral norm.

    Raises:
        CurvatureError: without ``compensate``, where A + δI is not positive definite; and where A has ``blocks``.
    """
    parts = (*operator.levels, operator.leaves, operator.basis, operator.values)
    if not math.isfinite(shift) or not all(bool(t.isfinite().all()) for t in parts):
        raise CurvatureError(f"factor: A + {shift} I is not finite")
    if operator.blocks:
        raise CurvatureError(
            "factor: blocks of format='adaptive' have no factor. Take inverse(shift), by conjugate gradients, or build "
            "by format='auto', shift=..., from the operator, or from this, which takes none of its products"
        )
    try:
        return Factorization(operator, shift)
    except CurvatureError:
        if operator.whole and operator.basis.shape[1]:
            return factorize(folded(operator), shift, compensate)
        scale = max(float(t.abs().max()) for t in parts if t.numel())
        if not compensate or not scale:
            raise
    return _compensated(operator, shift, scale)


def _compensated(operator: HierarchicalOperator, shift: float, scale: float) -> Factorization:
    """By powers of ten up, then down by halves of what is left of the exponent."""
    result, added = None, 1e-13 * scale
    while result is None:
        added *= 10
        result = _attempt(operator, shift, added)
    for step in (0.5, 0.25, 0.125):
        better = _attempt(operator, shift, added / 10**step)
        if better is not None:
            result, added = better, better.added
    return result


def _attempt(operator: HierarchicalOperator, shift: float, added: float) -> Factorization | None:
    try:
        result = Factorization(operator, shift + added)
    except CurvatureError:
        return None
    result.shift, result.added = shift, added
    return result


def _leaves(operator: HierarchicalOperator, shift: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues of every D + δI, with ones in the padding, and its inverse root."""
    leaves = operator.leaves.double().clone()
    diagonal = leaves.diagonal(dim1=1, dim2=2)
    padding = operator.tree.padding(leaves.device).reshape(diagonal.shape) > 0
    diagonal.copy_(torch.where(padding, torch.ones_like(diagonal), diagonal + shift))
    values, vectors = eigh(leaves)
    _positive(values, shift)
    return values, (vectors * values.rsqrt().unsqueeze(1)) @ vectors.mT


def _top(b: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal Q and μ of B diag(c) Bᵀ."""
    q, r = torch.linalg.qr(b)
    weights, vectors = eigh((r * values) @ r.mT)
    return q @ vectors, weights


def _apply_root(root: Root, v: Tensor) -> None:
    """v = M^-½ v, in place: on (Q₁ ± Q₂) / √2, M is 1 ± s."""
    level, q, s = root
    s = s.unsqueeze(-1)
    left, right = (pairs(q, level).mT @ pairs(v, level)).unbind(1)
    even, odd = ((1 + s).rsqrt() - 1) / 2 * (left + right), ((1 - s).rsqrt() - 1) / 2 * (left - right)
    add_product(v, nodes(q, level), torch.stack([even + odd, even - odd], 1).flatten(0, 1))


def _positive(values: Tensor, shift: float) -> None:
    if values.numel() and not bool((values > 0).all()):
        raise CurvatureError(
            f"factor: A + {shift} I is not positive definite. Pass a larger shift, compensate=True to add what is "
            "missing, or use the operator in MINRES"
        )
