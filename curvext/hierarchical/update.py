"""Operators from operators: compression, terms of low rank, averages, and what has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .hodlr import HierarchicalOperator
from .levels import composed, decomposed, pairs, scaled


def compressed(
    operator: HierarchicalOperator,
    tolerance: float | None = None,
    ranks: int | None = None,
    compensate: bool = False,
) -> HierarchicalOperator:
    """The levels' blocks with the least energy left out.

    Args:
        operator: whose levels to compress; leaves and its part of low rank stay.
        tolerance: what may be missing, in Frobenius norm relative to the tree's part.
        ranks: in place of ``tolerance``, the sum of the levels' ranks.
        compensate: add the largest singular value s left out of a block to the diagonal under both its children, so
            that nothing is lost in any direction: A ≤ result ≤ A + 2 ``slack``, slack = max over leaves of Σ s above.
            What was positive (semi-)definite stays so.
    """
    parts = [decomposed(f, level) for level, f in enumerate(operator.levels, 1)]
    keep = _kept([s for _, s, _ in parts], operator.leaves, tolerance, ranks)
    levels = [composed(u, s, w, rank) for (u, s, w), rank in zip(parts, keep, strict=True)]
    if not compensate:
        return operator.with_parts(levels, operator.leaves)
    slack = _slack([s for _, s, _ in parts], keep, operator.leaves)
    unit = torch.eye(operator.leaves.shape[1], dtype=operator.dtype, device=operator.device)
    result = operator.with_parts(levels, operator.leaves + slack[:, None, None] * unit)
    result.slack = float(slack.max())
    return result


def _kept(spectra: list[Tensor], leaves: Tensor, tolerance: float | None, ranks: int | None) -> list[int]:
    """The ranks of levels: columns in order of their energy, over all levels."""
    if (tolerance is None) == (ranks is None) or (tolerance or ranks or 0) < 0:
        raise ValueError(f"compressed: tolerance={tolerance}, ranks={ranks}: pass one of them, not negative")
    if not spectra:
        return []
    energies = torch.cat([s.double().square().sum(0) for s in spectra]).cpu()
    level = torch.cat([torch.full((s.shape[1],), i) for i, s in enumerate(spectra)])
    order = energies.argsort(descending=True, stable=True)
    if ranks is None:
        norm = 2 * energies.sum() + leaves.double().square().sum().cpu()
        missing = 2 * energies[order].flip(0).cumsum(0).flip(0)
        ranks = int((missing > float(tolerance or 0) ** 2 * norm).sum())
    return torch.bincount(level[order[:ranks]], minlength=len(spectra)).tolist()


def _slack(spectra: list[Tensor], keep: list[int], leaves: Tensor) -> Tensor:
    """For every leaf, the sum over the levels of the first singular value that its block leaves out."""
    slack = leaves.new_zeros(len(leaves))
    for s, rank in zip(spectra, keep, strict=True):
        if rank < s.shape[1]:
            slack += s[:, rank].repeat_interleave(len(leaves) // len(s))
    return slack


def plus(a: HierarchicalOperator, b: HierarchicalOperator, factor_a: float, factor_b: float) -> HierarchicalOperator:
    """``factor_a A + factor_b B`` over the same tree, with the ranks of both."""
    if a.tree != b.tree or len(a.levels) != len(b.levels):
        raise ValueError(f"operators over different trees or of different formats: {a.tree} and {b.tree}")
    both = enumerate(zip(a.levels, b.levels, strict=True), 1)
    levels = [torch.cat([scaled(f, level, factor_a), scaled(g, level, factor_b)], 1) for level, (f, g) in both]
    leaves = factor_a * a.leaves + factor_b * b.leaves
    basis = torch.cat([a.basis, b.basis], 1)
    values = torch.cat([factor_a * a.values, factor_b * b.values])
    blocks = [c.scaled(factor) for operator, factor in ((a, factor_a), (b, factor_b)) for c in operator.blocks]
    return HierarchicalOperator(a.tree, levels, leaves, basis, values, a.domain, blocks)


def with_low_rank(operator: HierarchicalOperator, x: Tensor, values: Tensor) -> HierarchicalOperator:
    """A + X diag(values) Xᵀ, in the blocks of the tree, or where there are none across the whole."""
    if x.dim() != 2 or x.shape[0] != operator.shape[0] or values.shape != x.shape[1:]:
        raise ValueError(f"add_low_rank: X {tuple(x.shape)} and values {tuple(values.shape)} to {operator}")
    x = operator.tree.enter(x)
    if operator.whole:
        return _in_blocks(operator, x, values)
    wider = operator.with_parts(operator.levels, operator.leaves)
    wider.basis, wider.values = torch.cat([operator.basis, x], 1), torch.cat([operator.values, values])
    return wider


def folded(operator: HierarchicalOperator) -> HierarchicalOperator:
    """The same, with its part of low rank in the blocks of the tree: every level's rank grows."""
    blocks = HierarchicalOperator(operator.tree, operator.levels, operator.leaves, space=operator.domain)
    return _in_blocks(blocks, operator.basis, operator.values)


def _in_blocks(operator: HierarchicalOperator, x: Tensor, values: Tensor) -> HierarchicalOperator:
    root = values.abs().sqrt()
    levels = []
    for level, f in enumerate(operator.levels, 1):
        left, right = pairs(x * root, level).unbind(1)
        more = torch.stack([left * values.sign(), right], 1).reshape(x.shape)
        levels.append(torch.cat([f, more], 1))
    blocks = x.unflatten(0, (len(operator.leaves), -1))
    return operator.with_parts(levels, operator.leaves + (blocks * values) @ blocks.mT)


def refreshed(old: HierarchicalOperator, operator: Any, tolerance: float, **options: Any) -> HierarchicalOperator:
    """``old``, if it is still good; else peeled anew, from the directions of ``old``.

    Sixteen products say how far off ``old`` is. Up to 1.25 ``tolerance`` it is returned as it is, with its ``error``
    anew. Else the directions that it has are not looked for again, only checked and added to: about one product for a
    column in place of two, and verified to be within ``tolerance``. (To peel the difference A - old takes more: what
    ``old`` leaves out has no structure.) Matrices so small that they are dense are read anew.
    """
    from .build import correct

    return correct(old, operator, tolerance, **options)
