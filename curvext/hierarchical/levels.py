"""What happens within one level: products, and the best approximation of its blocks.

The blocks of level l are stored as one tensor F ``[size, R]``, with U in the rows of left children and V in those of
right children: A[left, right] = U Vᵀ, A[right, left] = V Uᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pairs(f: Tensor, level: int) -> Tensor:
    """``[size, K]`` as ``[2^(level-1), 2, nodes' size, K]``."""
    return f.reshape(1 << (level - 1), 2, f.shape[0] >> level, f.shape[1])


def add_times(out: Tensor, f: Tensor, level: int, v: Tensor, factor: float = 1.0) -> None:
    """``out += factor`` times the level's blocks times ``v [size, K]``; in place, as fresh memory costs more time."""
    inner = (pairs(f, level).mT @ pairs(v, level)).flip(1).flatten(0, 1)
    add_product(out, nodes(f, level), inner, factor)


def nodes(f: Tensor, level: int) -> Tensor:
    """``[size, K]`` as ``[2^level, nodes' size, K]``."""
    return f.reshape(1 << level, f.shape[0] >> level, f.shape[1])


def add_product(out: Tensor, f: Tensor, x: Tensor, factor: float = 1.0) -> None:
    """``out [nodes * n, K] += factor`` f x, for f ``[nodes, n, R]`` and x ``[nodes, R, K]``; ``out`` is contiguous."""
    out.view(*f.shape[:2], out.shape[1]).baddbmm_(f, x, alpha=factor)


def scaled(f: Tensor, level: int, factor: float) -> Tensor:
    """F of ``factor`` times the blocks."""
    root = abs(factor) ** 0.5
    sides = f.new_tensor([root if factor >= 0 else -root, root]).view(2, 1, 1)
    return (pairs(f, level) * sides).reshape(f.shape)


def decomposed(f: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal ``u, w [pairs, n, k]`` and ``s [pairs, k]`` with U Vᵀ = u diag(s) wᵀ."""
    (q1, q2), (r1, r2) = (x.unbind(1) for x in torch.linalg.qr(pairs(f, level)))
    u, s, w = torch.linalg.svd(r1 @ r2.mT)
    return q1 @ u, s, q2 @ w.mT


def composed(u: Tensor, s: Tensor, w: Tensor, rank: int) -> Tensor:
    """F ``[size, rank]`` of the first ``rank`` triplets."""
    root = s[:, None, None, :rank].sqrt()
    return (torch.stack([u, w], 1)[..., :rank] * root).flatten(0, 2)


def rank_within(s: Tensor, budget: Tensor) -> int:
    """The least rank of the level whose remainder, over all pairs, is at most ``budget`` in squared Frobenius norm."""
    tails = s.double().square().sum(0).flip(0).cumsum(0).flip(0)
    return int((tails > budget).sum())
