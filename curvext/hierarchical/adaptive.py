"""Every block of the matrix as what is cheapest: low rank, its entries, or four smaller blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Blocks
from .hodlr import HierarchicalOperator
from .tree import ClusterTree


@dataclass(frozen=True)
class Level:
    """The spectra of a level's blocks; those below the diagonal, which mirror others, count as nothing.

    Args:
        energies: the squared singular values ``[nodes, nodes, n]``, twice off the diagonal.
        column: the floats that one of them takes with its vectors and place, at most, ``[nodes, nodes, 1]``.
        entries: the floats of a whole block and its place, ``[nodes, nodes]``.
    """

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

    Only leaves' blocks are stored entry by entry, as four smaller ones take as much as a larger one. The diagonal is
    exact. Takes the singular values of all blocks of all levels: O(size³), once.
    """
    levels = [_level(a, level) for level in range(tree.depth + 1)]
    norm = float(a.double().square().sum())
    plan = _least(levels, norm, tolerance, None if floats is None else floats - tree.size)
    blocks = [b for level, rank in enumerate(plan.ranks) for b in _low_rank(a, level, rank)]
    blocks += _dense(a, tree.depth, plan.dense)
    diagonal = a.diagonal() - sum(b.diagonal().squeeze(1) for b in blocks)
    result = HierarchicalOperator(tree, [], diagonal.view(-1, 1, 1), blocks=blocks)
    missing = max(0.0, plan.missing - float(diagonal.double().square().sum()))
    result.scale, result.error = norm**0.5, (missing / norm) ** 0.5 if norm else 0.0
    return result


def _nodes(a: Tensor, level: int) -> Tensor:
    """``[nodes, nodes, n, n]``."""
    n = len(a) >> level
    return a.view(1 << level, n, 1 << level, n).transpose(1, 2)


def _level(a: Tensor, level: int) -> Level:
    nodes, n = 1 << level, len(a) >> level
    energies = a.new_zeros(nodes, nodes, n, dtype=torch.float64)
    blocks, own = _nodes(a, level), torch.arange(nodes, device=a.device)
    i, j = torch.triu_indices(nodes, nodes, 1, device=a.device)
    energies[i, j] = 2 * torch.linalg.svdvals(blocks[i, j]).double().square()
    energies[own, own] = torch.linalg.eigvalsh(blocks[own, own]).double().square()
    unit, place = torch.eye(nodes, dtype=torch.float64, device=a.device), 8 / a.element_size()
    return Level(energies, (n * (2 - unit) + 1 + place).unsqueeze(-1), torch.full_like(unit, n * n + place).triu())


def _least(levels: list[Level], norm: float, tolerance: float | None, floats: int | None) -> Plan:
    """The plan at the largest μ that is accurate enough, or the smallest that is cheap enough, by bisection."""
    low, high = 1e-26 * norm, norm
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
        split = torch.minimum(cost, split)
        split = split.view(len(split) // 2, 2, -1, 2).sum((1, 3)) if len(split) > 1 else split
    return _choices(levels, wins[::-1], mu)


def _choices(levels: list[Level], wins: list[Tensor], mu: float) -> Plan:
    open_ = torch.ones_like(wins[0])
    ranks, missing, floats = [], 0.0, 0.0
    for level, win in zip(levels, wins, strict=True):
        more = len(win) // len(open_)
        open_ = open_.repeat_interleave(more, 0).repeat_interleave(more, 1)
        kept = level.energies > mu * level.column
        ranks.append(torch.where(open_ & win, kept.sum(-1), -1))
        missing += float((level.energies * ~kept)[open_ & win].sum())
        floats += float((level.column * kept)[open_ & win].sum())
        open_ = open_ & ~win
    dense = open_ & (levels[-1].entries > 0)
    return Plan(ranks, dense, missing, floats + float((levels[-1].entries * dense).sum()))


def _places(chosen: Tensor, mirrored: bool) -> Tensor:
    """Off the diagonal, or on it, ``[2, B]``."""
    return (chosen.triu(1) if mirrored else chosen.diagonal().diag()).nonzero().int().mT


def _low_rank(a: Tensor, level: int, ranks: Tensor) -> Iterator[Blocks]:
    """Blocks of 1, 2, 4, ... columns, so that few batches hold all ranks without padding."""
    for mirrored in (False, True):
        i, j = places = _places(ranks > 0, mirrored)
        if not len(i):
            continue
        rank = ranks[i, j]
        u, c, v = _decomposed(_nodes(a, level)[i, j], mirrored)
        for bit in range(int(rank.max()).bit_length()):
            chosen = ((rank >> bit) & 1).nonzero().squeeze(1)
            first = rank[chosen] & ((1 << bit) - 1)
            columns = first.unsqueeze(1) + torch.arange(1 << bit, device=a.device)
            left, right = (_columns(x[chosen], columns) for x in (u, v))
            factors = (left, c[chosen].gather(1, columns), right if mirrored else left)
            yield Blocks(level, places[:, chosen], factors, mirrored)


def _decomposed(blocks: Tensor, mirrored: bool) -> tuple[Tensor, Tensor, Tensor]:
    """U, c and V with the largest |c| first."""
    if mirrored:
        u, s, vt = torch.linalg.svd(blocks)
        return u, s, vt.mT
    values, vectors = torch.linalg.eigh(blocks)
    order = values.abs().argsort(descending=True)
    vectors = _columns(vectors, order)
    return vectors, values.gather(1, order), vectors


def _columns(x: Tensor, which: Tensor) -> Tensor:
    return x.gather(2, which.unsqueeze(1).expand(-1, x.shape[1], -1))


def _dense(a: Tensor, level: int, chosen: Tensor) -> Iterator[Blocks]:
    for mirrored in (False, True):
        i, j = places = _places(chosen, mirrored)
        if len(i):
            yield Blocks(level, places, (_nodes(a, level)[i, j],), mirrored)
