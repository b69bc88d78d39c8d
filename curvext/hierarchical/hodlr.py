"""The operator: a tree's blocks, dense leaves, and a part of low rank across the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators.base import Operator
from ..operators.space import Space
from ..operators.structured import Structured
from .blocks import Blocks
from .levels import add_times
from .tree import ClusterTree


class HierarchicalOperator(Structured):
    """A symmetric matrix of hierarchically off-diagonal low rank, and products in O(R n log n).

        A = Σₗ Σ_pairs [0, U Vᵀ; V Uᵀ, 0] + blockdiag(D) + B diag(c) Bᵀ

    over the levels l of a :class:`ClusterTree`, and blocks of any other nodes where ``format="adaptive"`` chose them.
    Storage is Σₗ Rₗ + leaf + rank of B floats a row, and that of the blocks. Usually built by
    :meth:`from_operator`. Nothing is changed in place: updates return another operator.

    Ambikasaran & Darve 2013; construction from products: Lin, Lu & Ying 2011, Martinsson 2016.

    Args:
        tree: order, padding and leaves.
        levels: for l = 1, 2, ...: F ``[tree.size, R]``, with U in the rows of left children and V in the others.
        leaves: D ``[tree.size / m, m, m]``, symmetric.
        basis, values: B ``[tree.size, R]`` and c ``[R]``.
        space: the parameters that the entries belong to.
        blocks: more blocks, anywhere; a result that has some has no :meth:`factor`.

    Attributes:
        error: ‖A - this‖ / ‖A‖ in Frobenius norm as estimated from products that the construction did not see (``None``
            where there was no construction).
        scale: ‖A‖ as estimated on the way.
        products: the products with A that the construction took.
        sampled: the columns drawn at every level, to account for them.
        slack: what compensated truncation added to the diagonal at most.
    """

    symmetric = True
    error: float | None = None
    scale: float | None = None
    products: int = 0
    sampled: Sequence[int] = ()
    slack: float = 0.0

    def __init__(
        self,
        tree: ClusterTree,
        levels: Sequence[Tensor],
        leaves: Tensor,
        basis: Tensor | None = None,
        values: Tensor | None = None,
        space: Space | None = None,
        blocks: Sequence[Blocks] = (),
    ):
        self.tree, self.levels, self.leaves, self.blocks = tree, list(levels), leaves, list(blocks)
        self.basis = leaves.new_zeros(tree.size, 0) if basis is None else basis
        self.values = self.basis.new_ones(self.basis.shape[1]) if values is None else values
        self._describe((tree.n, tree.n), leaves, space)
        wrong = [tuple(f.shape) for f in (*self.levels, self.basis) if f.shape[0] != tree.size]
        if wrong or leaves.shape[0] * leaves.shape[1] != tree.size or leaves.shape[1] != leaves.shape[2]:
            raise ValueError(f"HierarchicalOperator: {wrong or tuple(leaves.shape)} do not fit {tree}")

    @classmethod
    def from_operator(cls, operator: Any, tolerance: float | None = None, **options: Any) -> HierarchicalOperator:
        """Approximate anything with ``.shape`` and ``@``: see :func:`curvext.hierarchical.build.approximate`."""
        from .build import approximate

        return approximate(operator, tolerance, **options)

    @property
    def ranks(self) -> list[int]:
        """The rank stored at every level."""
        return [f.shape[1] for f in self.levels]

    @property
    def whole(self) -> bool:
        """Whether levels and leaves have a place for every entry."""
        return self.leaves.shape[1] << len(self.levels) == self.tree.size

    @property
    def bytes(self) -> int:
        """What is stored."""
        tensors = (*self.levels, self.leaves, self.basis, self.values)
        return sum(t.nbytes for t in tensors) + sum(b.bytes for b in self.blocks)

    def _apply(self, v: Tensor) -> Tensor:
        return self.tree.leave(self.inner(self.tree.enter(v)))

    def inner(self, v: Tensor) -> Tensor:
        """Products in the order of the tree, ``[tree.size, K]``."""
        out = (self.leaves @ v.reshape(*self.leaves.shape[:2], -1)).flatten(0, 1)
        for level, f in enumerate(self.levels, 1):
            add_times(out, f, level, v)
        for more in self.blocks:
            more.add_times(out, v)
        return out + self.across(v) if self.basis.shape[1] else out

    def across(self, v: Tensor) -> Tensor:
        """B diag(c) Bᵀ v, in the order of the tree."""
        return self.basis @ (self.values.unsqueeze(1) * (self.basis.mT @ v))

    def diagonal(self) -> Tensor:
        """The diagonal's entries ``[n]``."""
        entries = self.leaves.diagonal(dim1=1, dim2=2).flatten() + self.basis.square() @ self.values
        for more in self.blocks:
            more.add_diagonal(entries)
        return self.tree.leave(entries.unsqueeze(1)).squeeze(1)

    def trace(self) -> Tensor:
        """tr A."""
        return self.diagonal().sum()

    def with_parts(self, levels: Sequence[Tensor], leaves: Tensor) -> HierarchicalOperator:
        """The same with other levels and leaves."""
        return HierarchicalOperator(self.tree, levels, leaves, self.basis, self.values, self.domain, self.blocks)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> HierarchicalOperator:
        """With its entries moved."""

        def move(t: Tensor) -> Tensor:
            return t.to(device or self.device, dtype or self.dtype)

        parts = [move(f) for f in self.levels], move(self.leaves), move(self.basis), move(self.values)
        moved = HierarchicalOperator(self.tree, *parts, self.domain, [b.to(move) for b in self.blocks])
        moved.error, moved.scale = self.error, self.scale
        return moved

    def compressed(
        self, tolerance: float | None = None, ranks: int | None = None, compensate: bool = False
    ) -> HierarchicalOperator:
        """With lower ranks: see :func:`curvext.hierarchical.update.compressed`."""
        from .update import compressed

        return compressed(self, tolerance, ranks, compensate)

    def add_low_rank(self, x: Tensor, values: Tensor | None = None) -> HierarchicalOperator:
        """A + X diag(values) Xᵀ, X ``[n, R]``; exact, every level's rank grows by R: see :meth:`compressed`."""
        from .update import with_low_rank

        return with_low_rank(self, x, x.new_ones(x.shape[1:]) if values is None else values)

    def averaged(
        self, other: HierarchicalOperator, decay: float, tolerance: float | None = None, ranks: int | None = None
    ) -> HierarchicalOperator:
        """decay A + (1 - decay) B over the same tree; exact, or compressed to ``tolerance`` or ``ranks``.

        Their parts of low rank stand side by side, and are not compressed.
        """
        from .update import compressed, plus

        result = plus(self, other, decay, 1 - decay)
        return result if tolerance is ranks is None else compressed(result, tolerance, ranks)

    def refreshed(self, operator: Any, tolerance: float, **options: Any) -> HierarchicalOperator:
        """Brought up to date, if it has to be: see :func:`curvext.hierarchical.update.refreshed`."""
        from .update import refreshed

        return refreshed(self, operator, tolerance, **options)

    def factor(self, shift: float = 0.0, compensate: bool = False) -> Any:
        """(A + δI)⁻¹, its root, log det, diagonal: see :class:`curvext.hierarchical.factor.Factorization`."""
        from .factor import factorize

        return factorize(self, shift, compensate)

    def inverse(self, damping: float = 0.0, solver: str | Callable[..., Any] = "", **options: Any) -> Operator:
        """(A + δI)⁻¹, factored unless a solver is named (with ``blocks``: by conjugate gradients).

        Refused where A + δI is not positive definite.
        """
        if solver or self.blocks:
            return super().inverse(damping, solver or "cg", **options)
        return self.factor(damping)
