"""Low rank across the whole and a diagonal, from products alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg import eigh
from .hodlr import HierarchicalOperator
from .peel import Source, _orthonormal, _without

if TYPE_CHECKING:
    from .build import Probes

BATCH = 16


def low_rank(
    source: Source, scale: float, tolerance: float | None, rank: int | None, flat: bool = False
) -> HierarchicalOperator:
    """A ≈ B diag(c) Bᵀ + diag(d): Rayleigh-Ritz in the space of AΩ and A(AΩ), Ω random.

    Takes three products for a direction. The diagonal comes after, by :func:`with_diagonal`. ``flat``: ends where a
    batch of directions leaves more than half of what there was, in squared norm, and drops no more than that.
    """
    size = source.tree.size
    cap = size if rank is None else max(rank, 0)
    share = 0.0 if tolerance is None else (tolerance * scale) ** 2 / 4
    q, missing = _range(source, min(cap + BATCH, source.tree.n), share, scale, 0.5 if flat else math.inf)
    z = source(q)
    more = _nonzero(_orthonormal(_without(_without(z, q), q), q, 1e-6 * scale))
    q, z = torch.cat([q, more], 1), torch.cat([z, source(more)], 1)
    t = q.mT @ z
    values, vectors = eigh((t + t.mT) / 2)
    values, vectors = _largest(values, vectors, cap, max(share / 4, missing if flat else 0.0))
    return HierarchicalOperator(source.tree, [], source.like.new_zeros(size, 1, 1), q @ vectors, values)


def _range(source: Source, cap: int, share: float, scale: float, most: float) -> tuple[Tensor, float]:
    """Directions, and the squared norm that the last ones left; ``most``, as a fraction, ends the search."""
    left = math.inf
    q = source.like.new_zeros(source.tree.size, 0)
    rounding = scale * (1e-11 if q.dtype == torch.float64 else 1e-6)
    while q.shape[1] < cap:
        y = source(source.normal(source.tree.size, min(BATCH, cap - q.shape[1])))
        y = _without(_without(y, q), q)
        before, left = left, float(y.double().square().sum()) / y.shape[1]
        if left <= share or left > most * before:
            break
        more = _nonzero(_orthonormal(y, q, rounding))
        q = torch.cat([q, more], 1)
        if not more.shape[1]:
            break
    return q, left


def _nonzero(q: Tensor) -> Tensor:
    return q[:, q.square().sum(0) > 0.5]


def _largest(values: Tensor, vectors: Tensor, cap: int, share: float) -> tuple[Tensor, Tensor]:
    """The eigenvalues of largest size, at most ``cap``, the others of a squared norm up to ``share``."""
    order = values.abs().argsort(descending=True)
    tails = values[order].double().square().flip(0).cumsum(0).flip(0)
    order = order[: min(cap, int((tails > share).sum()))]
    return values[order], vectors[:, order]


def with_diagonal(result: HierarchicalOperator, probes: Probes, fresh: Probes) -> HierarchicalOperator:
    """``result`` and α d̂ + β on the diagonal, d̂ what probes see of the residual's.

    α and β make the error on fresh probes least, so that the noise of d̂ is damped. Where all of c is positive, so
    is the diagonal, and the result.
    """
    missing = probes.products - result.inner(probes.vectors)
    seen = (missing * probes.vectors).sum(1) / probes.vectors.square().sum(1).clamp(min=1e-30)
    real = (1 - result.tree.padding(seen.device)).to(seen.dtype)
    columns = torch.stack([(d * real).unsqueeze(1) * fresh.vectors for d in (seen, torch.ones_like(seen))], -1)
    target = (fresh.products - result.inner(fresh.vectors)).flatten()
    columns = columns.flatten(0, 1)
    gram = columns.mT @ columns
    weights = torch.linalg.pinv(gram, hermitian=True) @ (columns.mT @ target)
    diagonal = real * (weights[0] * seen + weights[1])
    if bool((result.values >= 0).all()):
        diagonal = diagonal.clamp(min=0)
    return HierarchicalOperator(result.tree, [], diagonal.view(-1, 1, 1), result.basis, result.values)
