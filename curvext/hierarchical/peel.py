"""Blocks from products alone, from the coarsest level to the leaves (peeling)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..operators.base import Readable
from .hodlr import HierarchicalOperator
from .levels import add_times, composed, decomposed, pairs, rank_within
from .tree import ClusterTree

WIDTH = 64  # columns of one product
STRIP = 256  # rows read at once


def reader(operator: Any) -> Callable[[slice, slice], Tensor] | None:
    """What gives the entries of some rows and columns, if anything does: ``operator.entries``."""
    if isinstance(operator, Tensor):
        return lambda rows, columns: operator[rows][:, columns]
    return getattr(operator, "entries", None)


@dataclass
class Source:
    """The operator's products in the order of the tree, counted, and refused beyond ``limit``."""

    operator: Any
    tree: ClusterTree
    like: Tensor
    limit: int
    generator: torch.Generator | None = None
    products: int = 0

    def __call__(self, v: Tensor) -> Tensor:
        """``[size, K]`` to ``[size, K]``."""
        if self.products + v.shape[1] > self.limit:
            raise CurvatureError(
                f"more than {self.limit} products with an operator of {self.tree.n} rows are needed: it is not of low "
                "rank, or not in this order. Use a larger tolerance, max_bytes in its place, or a dense matrix; "
                "max_products allows more"
            )
        self.products += v.shape[1]
        v = self.tree.leave(v)
        out = [(self.operator @ part).detach() for part in v.split(WIDTH, 1)]
        return self.tree.enter(torch.cat(out, 1))

    def matrix(self) -> Tensor:
        """All entries in the order of the tree, ``[size, size]``: read where that can be, else by products."""
        n, read = self.tree.n, reader(self.operator)
        if read is None and n > self.limit:
            raise CurvatureError(
                f"all {n} x {n} entries are needed, and products with the operator limited to {self.limit}: allow n by "
                "max_products, or give the operator entries(rows, columns)"
            )
        if read is None:
            rows = self(self.tree.enter(torch.eye(n, dtype=self.like.dtype, device=self.like.device)))
        else:
            strips = [read(slice(start, start + STRIP), slice(None)) for start in range(0, n, STRIP)]
            rows = self.tree.enter(torch.cat(strips).detach())
        return self.tree.enter(rows.mT)

    @property
    def places(self) -> Tensor:
        """The operator's index of every row of the tree, and any where the padding is."""
        return self.tree.enter(torch.arange(self.tree.n, device=self.like.device).unsqueeze(1)).squeeze(1)

    @property
    def real(self) -> Tensor:
        """Zeros where the padding is, else ones."""
        return (1 - self.tree.padding(self.like.device)).to(self.like.dtype)

    def across(self, v: Tensor, level: int, side: int) -> Tensor:
        """A level's blocks, by entries, times columns ``[pairs, n, K]`` on one side of every pair."""
        places, real = pairs(self.places.unsqueeze(1), level).squeeze(3), pairs(self.real.unsqueeze(1), level)
        found = self.operator.block_times(places[:, 1 - side], places[:, side], v * real[:, side])
        return (found * real[:, 1 - side]).detach()

    def within(self) -> Tensor:
        """The leaves, by entries."""
        places = self.places.view(-1, self.tree.leaf)
        return self.operator.entries(places, places).detach()

    def normal(self, *shape: int) -> Tensor:
        """Gaussian entries."""
        draw = torch.randn(shape, generator=self.generator, dtype=self.like.dtype, device=_home(self))
        return draw.to(self.like.device)


def _home(source: Source) -> torch.device:
    return source.like.device if source.generator is None else source.generator.device


@dataclass
class Peeling:
    """One pass over the levels.

    Args:
        source: what is to be approximated.
        budget: the squared Frobenius norm that may be missing.
        scale: the norm below which a direction is rounding.
        low: whose part of low rank is taken off A first, and is part of the result.
        cap: the largest rank of a level.
        batch: columns drawn at a time.
        start: directions of the left children of every level, known from an earlier pass.
        leak: what coarser levels left out and products of finer ones therefore see, as a squared norm: a quarter of
            their blocks lies in the rows of left children and the columns of right ones, and A has every block twice.
    """

    source: Source
    budget: float
    scale: float
    low: HierarchicalOperator
    cap: int | None = None
    batch: int = 8
    start: list[Tensor] = field(default_factory=list)
    levels: list[Tensor] = field(default_factory=list)
    leak: float = 0.0
    sampled: list[int] = field(default_factory=list)

    @property
    def direct(self) -> bool:
        """Whether blocks are multiplied alone, so that nothing has to be peeled off and nothing leaks."""
        return isinstance(self.source.operator, Readable)

    @property
    def tree(self) -> ClusterTree:
        """Of the operator."""
        return self.source.tree

    def run(self) -> HierarchicalOperator:
        """All levels, then the leaves."""
        share = self.budget / (2 * (self.tree.depth + 1))
        for level in range(1, self.tree.depth + 1):
            self.levels.append(self._level(level, share))
        return self.low.with_parts(self.levels, self._leaves())

    def _level(self, level: int, share: float) -> Tensor:
        q = self._range(level, share)
        self.sampled.append(q.shape[-1])
        if not q.shape[-1]:
            return self.source.like.new_zeros(self.tree.size, 0)
        z = self._on(q, level, 0)
        u, s, w = decomposed(torch.stack([q, z], 1).reshape(-1, q.shape[-1]), level)
        rank = rank_within(s, s.new_tensor(share / 2, dtype=torch.float64))
        rank = min(rank, s.shape[1] if self.cap is None else self.cap)
        self.leak += float(s[:, rank:].double().square().sum()) / 2
        return composed(u, s, w, rank)

    def _range(self, level: int, share: float) -> Tensor:
        """Orthonormal directions ``[pairs, n, R]`` of the blocks' columns; all of them where they are many."""
        n = self.tree.size >> level
        q = self.start[level - 1] if self.start else self.source.like.new_zeros(1 << (level - 1), n, 0)
        while True:
            y = self._on(self.source.normal(1 << (level - 1), n, self.batch), level, 1)
            y = _without(_without(y, q), q)
            missing = float(y.double().square().sum()) / self.batch
            missing -= 0.0 if self.direct else min(self.leak, level * share)
            if missing <= share or q.shape[-1] == self.cap:
                self.leak += max(missing, 0.0) / 2
                return q
            if 2 * (q.shape[-1] + self.batch) >= n:
                return torch.eye(n, dtype=y.dtype, device=y.device).expand(len(q), n, n)
            q = torch.cat([q, _orthonormal(y, q, self._rounding())], -1)[..., : self.cap]

    def _rounding(self) -> float:
        return self.scale * (1e-11 if self.source.like.dtype == torch.float64 else 1e-6)

    def _on(self, v: Tensor, level: int, side: int) -> Tensor:
        """What is left of A, times columns ``[pairs, n, K]`` on one side of every pair: the rows of the other side."""
        if self.direct:
            b = pairs(self.low.basis, level)
            low = b[:, 1 - side] @ (self.low.values.unsqueeze(1) * (b[:, side].mT @ v))
            return self.source.across(v, level, side) - low
        both = torch.zeros_like(v.unsqueeze(1).expand(-1, 2, -1, -1), memory_format=torch.contiguous_format)
        both[:, side] = v
        return pairs(self._left(both.reshape(-1, v.shape[-1])), level)[:, 1 - side]

    def _left(self, v: Tensor) -> Tensor:
        out = (self.source(v) - self.low.across(v)).contiguous()
        for level, f in enumerate(self.levels, 1):
            add_times(out, f, level, v, -1.0)
        return out

    def _leaves(self) -> Tensor:
        """Symmetric, and zero in the padding."""
        leaves = self._read_leaves() if self.direct else self._peeled_leaves()
        real = self.source.real.view(-1, self.tree.leaf, 1)
        return (leaves + leaves.mT) / 2 * real * real.mT

    def _read_leaves(self) -> Tensor:
        b = self.low.basis.unflatten(0, (-1, self.tree.leaf))
        return self.source.within() - (b * self.low.values) @ b.mT

    def _peeled_leaves(self) -> Tensor:
        """Unit columns in all leaves at once; random signs keep what is missing elsewhere from adding up."""
        m = self.tree.leaf
        unit = torch.eye(m, dtype=self.source.like.dtype, device=self.source.like.device)
        signs = self.source.normal(self.tree.size // m, 1, 1).sign()
        return signs * self._left((signs * unit).reshape(-1, m)).reshape(-1, m, m)


def _without(y: Tensor, q: Tensor) -> Tensor:
    return y - q @ (q.mT @ y)


def _orthonormal(y: Tensor, q: Tensor, rounding: float) -> Tensor:
    """New directions, and zeros for those that are rounding, as where a block's range is exhausted.

    The strongest come first, so that the rounding in a weak direction reaches none that is kept.
    """
    first, r = torch.linalg.qr(y)
    u, s, _ = torch.linalg.svd(r)
    second, r = torch.linalg.qr(_without(first @ u * (s > rounding).unsqueeze(-2), q))
    kept = (r.diagonal(dim1=-2, dim2=-1).abs() > 0.5).cumprod(-1)
    return second * kept.unsqueeze(-2)
