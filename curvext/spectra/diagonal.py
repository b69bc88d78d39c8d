"""The diagonal of a symmetric operator from products with random vectors: Hutchinson (Bekas), XDiag."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..progress import shown
from ..solvers.solution import times
from .estimate import Estimate, batches, columns, leave_one_out, probes, units, unknowns


def diagonal(operator: Any, *, method: str = "xdiag", products: int = 60, seed: int = 0, **options: Any) -> Estimate:
    """diag A ``[P]`` from ``products`` products; ``method`` is ``"xdiag"`` or ``"hutchinson"``."""
    methods = {"xdiag": xdiag, "hutchinson": hutchinson_diagonal}
    if method not in methods:
        raise CurvatureError(f"diagonal by {method!r}: one of {', '.join(methods)}")
    return methods[method](operator, products=products, seed=seed, **options)


def hutchinson_diagonal(
    operator: Any, *, products: int = 100, chunk: int = 16, seed: int = 0, progress: bool = False
) -> Estimate:
    """diag A = E[z ∘ Az], z Rademacher: aᵢᵢ with variance Σⱼ≠ᵢ aᵢⱼ² for one vector. Memory of ``chunk`` + 3 vectors.

    Source: C. Bekas, E. Kokiopoulou, Y. Saad, An estimator for the diagonal of a matrix, 2007.
    """
    if products < 2:
        raise CurvatureError("an error bar needs two random vectors at least")
    total = squares = torch.zeros(operator.shape[0], dtype=operator.dtype, device=operator.device)
    for z in shown(batches(operator, products, chunk, seed=seed), progress, "diagonal", -(-products // chunk)):
        samples = z * times(operator, z)
        total, squares = total + samples.sum(1), squares + (samples * samples).sum(1)
    mean = total / products
    variance = (squares / products - mean**2).clamp(min=0) / (products - 1)
    return Estimate(mean, variance.sqrt(), products)


def xdiag(operator: Any, *, products: int = 60, chunk: int = 16, seed: int = 0, progress: bool = False) -> Estimate:
    """A = QᵢQᵢᵀA + (I - QᵢQᵢᵀ)A: the diagonal of the first part exactly, of the second from zᵢ; the mean over i.

    m = ``products`` / 2 Rademacher vectors, Qᵢ a basis of the images of all but the i-th. Memory of 6 m vectors; exact
    for rank below m. ``error`` is the spread over i, indicative since the terms are not independent.

    Source: E. Epperly, J. Tropp, R. Webber, XTrace: making the most of every sample in stochastic trace estimation,
        2024.
    """
    n = unknowns(operator)
    if products >= n:
        value = torch.cat([(e * times(operator, e)).sum(0) for e in units(operator, chunk)])
        return Estimate(value, torch.zeros_like(value), n)
    if products < 4:
        raise CurvatureError(f"products={products}: four at least")
    m = products // 2
    Z = _independent(operator, m, seed)
    Y = columns(operator, Z, chunk, progress)
    Q, R = torch.linalg.qr(Y)
    U, S = leave_one_out(R)
    Q = Q @ U
    AQ = columns(operator, Q, chunk, progress)
    left_out = Q @ S  # the direction that leaving column i out takes from Q
    # (I - QᵢQᵢᵀ) A zᵢ is the part of A zᵢ along it
    rest = Z * left_out * (left_out * Y).sum(0)
    samples = (rest - left_out * (AQ @ S)).T
    estimate = Estimate.mean(samples, m + Q.shape[1])
    return Estimate(estimate.value + (Q * AQ).sum(1), estimate.error, estimate.products)


def _independent(operator: Any, m: int, seed: int) -> Tensor:
    """Random signs, drawn again where short columns of them depend on each other."""
    Z = probes(operator, m, seed=seed)
    while len(Z) <= 64 and int(torch.linalg.matrix_rank(Z)) < m:
        seed += 1 << 20
        Z = probes(operator, m, seed=seed)
    return Z
