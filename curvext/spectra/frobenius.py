"""The Frobenius norm of a symmetric operator."""

from __future__ import annotations

from typing import Any

import torch

from ..progress import shown
from ..solvers.solution import times
from .estimate import Estimate, units, unknowns
from .trace import split


def frobenius_norm(
    operator: Any, *, products: int = 60, chunk: int = 16, seed: int = 0, progress: bool = False
) -> Estimate:
    """‖A‖_F for symmetric A, by Hutch++ on A²: ‖A‖_F² = ‖AQ‖_F² + E‖A (I - QQᵀ) z‖², Q a sketch of A's range.

    No product is needed twice. The square is unbiased; ``error`` is that of the root, to first order.
    """
    if products >= unknowns(operator):
        squares = [(times(operator, e) ** 2).sum() for e in units(operator, chunk)]
        norm = torch.stack(squares).sum().sqrt()
        return Estimate(norm, torch.zeros_like(norm), operator.shape[0])
    _, AQ, rest, used = split(operator, products, chunk, seed, progress)
    remainder = torch.cat([(times(operator, z) ** 2).sum(0) for z in shown(rest, progress, "rest")])
    square = Estimate.mean(remainder, used + len(remainder))
    norm = ((AQ * AQ).sum() + square.value).sqrt()
    return Estimate(norm, torch.where(norm > 0, square.error / (2 * norm), square.error), square.products)
