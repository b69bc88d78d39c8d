"""Every block of the matrix as what is cheapest: low rank, its entries, or four smaller blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import eigh, eigvalsh
from .blocks import Blocks
from .hodlr import HierarchicalOperator
from .tree import ClusterTree


@dataclass(frozen=True)
class Nodes:
    """Of one level, from ``first [nodes]``, of ``sizes [nodes]`` entries, parts of ``parents [nodes]``."""

    first: Tensor
    sizes: Tensor
    parents: Tensor

    def alike(self, chosen: Tensor) -> Iterator[Pairs]:
        """Pairs on the diagonal and above it, as ``chosen [nodes, nodes]``, those of one shape together."""
        for mirrored in (False, True):
            i, j = (chosen.triu(1) if mirrored else chosen.diagonal().diag()).nonzero().mT
            shapes, shape = torch.stack([self.sizes[i], self.sizes[j]]).unique(dim=1, return_inverse=True)
            for own in range(shapes.shape[1]):
                yield Pairs(self, i[shape == own], j[shape == own], mirrored)

    def summed(self, x: Tensor) -> Tensor:
        """``[nodes, nodes]`` to the sums over pairs of children, ``[parents, parents]``."""
        for _ in range(2):
            x = x.new_zeros(int(self.parents[-1]) + 1, x.shape[1]).index_add_(0, self.parents, x).mT
        return x


@dataclass(frozen=True)
class Pairs:
    """B pairs of a level's nodes, all of one shape, i = j or i < j."""

    nodes: Nodes
    i: Tensor
    j: Tensor
    mirrored: bool

    def places(self) -> Tensor:
        """First rows and columns, ``[2, B]``."""
        return torch.stack([self.nodes.first[self.i], self.nodes.first[self.j]]).int()

    def of(self, a: Tensor) -> Tensor:
        """Their blocks ``[B, m, n]``."""
        (i, j), sizes = self.places(), self.nodes.sizes
        m, n = (torch.arange(int(sizes[k[0]]), device=a.device) for k in (self.i, self.j))
        return a[(i[:, None] + m).unsqueeze(2), (j[:, None] + n).unsqueeze(1)]


@dataclass(frozen=True)
class Level:
    """The spectra of a level's blocks; those below the diagonal, which mirror others, count as nothing.

    Args:
        nodes: of the level.
        energies: the squared singular values ``[nodes, nodes, n]``, twice off the diagonal.
        column: the floats that one of them takes with its vectors and place, at most, ``[nodes, nodes, 1]``.
        entries: the floats of a whole block and its place, ``[nodes, nodes]``.
    """

    nodes: Nodes
    energies: Tensor
    column: Tensor
    entries: Tensor


@dataclass(frozen=True)
class Plan:
    """What each block is to be.

    Args:
        ranks: for every level, ``[nodes, nodes]``, -1 where the block is split or part of a larger one.
        dense: leaves' blocks stored as they are, ``[nodes, nodes]``.
        missing: ‖A - result‖² in Frobenius norm, before the diagonal is made exact.
        floats: what it takes.
    """

    ranks: list[Tensor]
    dense: Tensor
    missing: float
    floats: float


def adapted(a: Tensor, tree: ClusterTree, tolerance: float | None, floats: int | None) -> HierarchicalOperator:
    """The partition of least ‖A - result‖² + μ floats, with the μ that meets ``tolerance``, or else ``floats``.

    Blocks are between nodes of :meth:`ClusterTree.aligned`: a Hessian's are of low rank where they end with units. Only
    leaves' blocks are stored entry by entry, as four smaller ones take as much as a larger one. The diagonal is exact.
    Takes the singular values of all blocks of all levels: O(size³), once.
    """
    levels = [_level(a, nodes) for nodes in _nodes(tree, a.device)]
    norm = float(a.double().square().sum())
    plan = _least(levels, norm, tolerance, None if floats is None else floats - tree.size)
    blocks = [b for level, rank in zip(levels, plan.ranks, strict=True) for b in _low_rank(a, level.nodes, rank)]
    blocks += [Blocks(p.places(), (p.of(a),), p.mirrored) for p in levels[-1].nodes.alike(plan.dense)]
    missing = a.diagonal().clone()
    for block in blocks:
        block.scaled(-1.0).add_diagonal(missing)
    result = HierarchicalOperator(tree, [], missing.view(-1, 1, 1), blocks=blocks)
    left = max(0.0, plan.missing - float(missing.double().square().sum()))
    result.scale, result.error = norm**0.5, (left / norm) ** 0.5 if norm else 0.0
    return result


def _nodes(tree: ClusterTree, device: torch.device) -> Iterator[Nodes]:
    above = torch.zeros(1, dtype=torch.long, device=device)
    for places in tree.aligned():
        first, end = (torch.tensor(x, device=device) for x in (places[:-1], places[1:]))
        yield Nodes(first, end - first, torch.searchsorted(above, first, right=True) - 1)
        above = first


def _level(a: Tensor, nodes: Nodes) -> Level:
    sizes = nodes.sizes
    energies = a.new_zeros(len(sizes), len(sizes), int(sizes.max()), dtype=torch.float64)
    for pairs in nodes.alike(torch.ones_like(energies[..., 0])):
        values = torch.linalg.svdvals(pairs.of(a)) if pairs.mirrored else eigvalsh(pairs.of(a))
        energies[pairs.i, pairs.j, : values.shape[1]] = (1 + pairs.mirrored) * values.double().square()
    place = 8 / a.element_size()
    column = (sizes.unsqueeze(1) + sizes - sizes.diag() + 1 + place).double()
    return Level(nodes, energies, column.unsqueeze(-1), (sizes.unsqueeze(1) * sizes + place).triu().double())


def _least(levels: list[Level], norm: float, tolerance: float | None, floats: int | None) -> Plan:
    """The plan at the largest μ that is accurate enough, or the smallest that is cheap enough, by bisection."""
    low, high = 1e-34 * norm, norm
    best = _plan(levels, low if floats is None else high)
    for _ in range(40):
        mu = (low * high) ** 0.5
        plan = _plan(levels, mu)
        good = plan.missing <= (tolerance or 0.0) ** 2 * norm if floats is None else plan.floats <= floats
        low, high = (mu, high) if good == (floats is None) else (low, mu)
        best = plan if good else best
    return best


def _plan(levels: list[Level], mu: float) -> Plan:
    """Costs from the leaves up, then choices from the root down."""
    split, wins = mu * levels[-1].entries, []
    for level in reversed(levels):
        cost = torch.minimum(level.energies, mu * level.column).sum(-1)
        wins.append(cost <= split)
        split = level.nodes.summed(torch.minimum(cost, split))
    return _choices(levels, wins[::-1], mu)


def _choices(levels: list[Level], wins: list[Tensor], mu: float) -> Plan:
    open_ = torch.ones_like(wins[0])
    ranks, missing, floats = [], 0.0, 0.0
    for level, win in zip(levels, wins, strict=True):
        open_ = open_[level.nodes.parents][:, level.nodes.parents]
        kept = level.energies > mu * level.column
        ranks.append(torch.where(open_ & win, kept.sum(-1), -1))
        missing += float((level.energies * ~kept)[open_ & win].sum())
        floats += float((level.column * kept)[open_ & win].sum())
        open_ = open_ & ~win
    dense = open_ & (levels[-1].entries > 0)
    return Plan(ranks, dense, missing, floats + float((levels[-1].entries * dense).sum()))


def _low_rank(a: Tensor, nodes: Nodes, ranks: Tensor) -> Iterator[Blocks]:
    """Blocks of 1, 2, 4, ... columns, so that few batches hold all ranks without padding."""
    for pairs in nodes.alike(ranks > 0):
        rank, places = ranks[pairs.i, pairs.j], pairs.places()
        u, c, v = _decomposed(pairs.of(a), pairs.mirrored)
        for bit in range(int(rank.max()).bit_length()):
            chosen = ((rank >> bit) & 1).nonzero().squeeze(1)
            if not len(chosen):
                continue
            first = rank[chosen] & ((1 << bit) - 1)
            columns = first.unsqueeze(1) + torch.arange(1 << bit, device=a.device)
            left, right = (_columns(x[chosen], columns) for x in (u, v))
            factors = (left, c[chosen].gather(1, columns), right if pairs.mirrored else left)
            yield Blocks(places[:, chosen], factors, pairs.mirrored)


def _decomposed(blocks: Tensor, mirrored: bool) -> tuple[Tensor, Tensor, Tensor]:
    """U, c and V with the largest |c| first."""
    if mirrored:
        u, s, vt = torch.linalg.svd(blocks, full_matrices=False)
        return u, s, vt.mT
    values, vectors = eigh(blocks)
    order = values.abs().argsort(descending=True)
    vectors = _columns(vectors, order)
    return vectors, values.gather(1, order), vectors


def _columns(x: Tensor, which: Tensor) -> Tensor:
    return x.gather(2, which.unsqueeze(1).expand(-1, x.shape[1], -1))
