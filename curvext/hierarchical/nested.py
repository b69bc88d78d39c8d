"""All levels from one batch of products, by block nullification (Levitt & Martinsson 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from .hodlr import HierarchicalOperator
from .tree import ClusterTree

MORE = 10  # columns beyond what the rank needs


def columns(tree: ClusterTree, rank: int) -> int:
    """The products that a rank takes, whatever n is."""
    return max(tree.leaf, 2 * rank) + rank + MORE


def nested(tree: ClusterTree, omega: Tensor, y: Tensor, rank: int) -> HierarchicalOperator:
    """From Ω Gaussian and Y = A Ω, ``[size, columns(tree, rank)]``; blocks of ``rank`` in nested bases.

    For a node t, the null space P of Ω_t makes Y_t P a sample of A[t, others] alone: its basis U. What the bases do not
    hold is D_t; then UᵀAU - D has the same form over half the nodes.
    """
    y, omega = y.reshape(-1, tree.leaf, y.shape[1]), omega.reshape(-1, tree.leaf, omega.shape[1])
    bases, blocks = [], []
    for _ in range(tree.depth):
        u, d = _node(y, omega, min(rank, y.shape[1]))
        bases.append(u)
        blocks.append(d)
        y, omega = _up(u.mT @ (y - d @ omega)), _up(u.mT @ omega)
    root = y @ torch.linalg.pinv(omega)
    return _unfolded(tree, bases, blocks, (root + root.mT) / 2)


def _up(x: Tensor) -> Tensor:
    """Children ``[nodes, k, K]`` above one another."""
    return x.reshape(x.shape[0] // 2, 2 * x.shape[1], x.shape[2])


def _node(y: Tensor, omega: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U ``[nodes, n, rank]`` and D ``[nodes, n, n]``."""
    null = torch.linalg.qr(omega.mT, mode="complete")[0][..., omega.shape[1] :]
    u = torch.linalg.svd(y @ null, full_matrices=False)[0][..., :rank]
    x = y @ torch.linalg.pinv(omega)
    r = x - u @ (u.mT @ x)
    d = r + u @ (u.mT @ r.mT)
    return u, (d + d.mT) / 2


def _unfolded(tree: ClusterTree, bases: list[Tensor], blocks: list[Tensor], block: Tensor) -> HierarchicalOperator:
    """From the root down: a node's block, in its children's bases, gives a level, and the blocks that they pass on."""
    whole = [bases[0].flatten(0, 1)]
    for u in bases[1:]:
        below = whole[-1].reshape(len(u), 2, -1, u.shape[1] // 2)
        whole.append((below @ u.reshape(len(u), 2, -1, u.shape[2])).flatten(0, 2))
    levels = []
    for u, d, wide in zip(reversed(bases), reversed(blocks), reversed(whole), strict=True):
        k = u.shape[2]
        pair = wide.reshape(len(block), 2, -1, k)
        levels.append(torch.stack([pair[:, 0] @ block[:, :k, k:], pair[:, 1]], 1).flatten(0, 2))
        own = torch.stack([block[:, :k, :k], block[:, k:, k:]], 1).flatten(0, 1)
        block = d + u @ own @ u.mT
    real = (1 - tree.padding(block.device)).to(block.dtype).view(len(block), -1, 1)
    return HierarchicalOperator(tree, [f * real.flatten(0, 1) for f in levels], block * real * real.mT)
