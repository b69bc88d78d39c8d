"""The trace of an operator from products with random vectors: Hutchinson, Hutch++, XTrace."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..progress import shown
from ..solvers.solution import times
from .estimate import Estimate, batches, columns, leave_one_out, probes, units, unknowns


def trace(operator: Any, *, method: str = "xtrace", products: int = 60, seed: int = 0, **options: Any) -> Estimate:
    """tr A from ``products`` products; ``method`` is ``"xtrace"``, ``"hutch++"`` or ``"hutchinson"``.

    Which: XTrace for a symmetric operator whose spectrum decays, as curvature does; Hutchinson where its ``products`` /
        2 vectors
    are more than memory holds.
    """
    methods = {"xtrace": xtrace, "hutch++": hutch_pp, "hutchinson": hutchinson}
    if method not in methods:
        raise CurvatureError(f"trace by {method!r}: one of {', '.join(methods)}")
    return methods[method](operator, products=products, seed=seed, **options)


def hutchinson(
    operator: Any,
    *,
    products: int = 100,
    kind: str = "rademacher",
    chunk: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """tr A = E[zᵀAz], the mean over ``products`` random vectors, ``chunk`` at a time.

    With Rademacher vectors the variance of one is 2 (‖A‖_F² - Σ aᵢᵢ²) for symmetric A: zero for diagonal ones.

    Source: M. Hutchinson, A stochastic estimator of the trace of the influence matrix, 1989.
    """
    work = shown(batches(operator, products, chunk, kind, seed), progress, "trace", -(-products // chunk))
    return Estimate.mean(torch.cat([(z * times(operator, z)).sum(0) for z in work]), products)


def hutch_pp(operator: Any, *, products: int = 60, chunk: int = 16, seed: int = 0, progress: bool = False) -> Estimate:
    """tr A = tr QᵀAQ + tr (I - QQᵀ)A(I - QQᵀ): Q spans a sketch of A's range, the rest is left to Hutchinson.

    A third of the products each for the sketch, for Q and for the rest; memory of ``products`` / 3 vectors. ``error``
    is of the rest, the first part being exact.

    Source: R. Meyer, C. Musco, C. Musco, D. Woodruff, Hutch++: optimal stochastic trace estimation, 2021.
    """
    if products >= unknowns(operator):
        return _exact(operator, chunk)
    Q, AQ, rest, used = split(operator, products, chunk, seed, progress)
    remainder = torch.cat([(z * times(operator, z)).sum(0) for z in shown(rest, progress, "rest")])
    estimate = Estimate.mean(remainder, used + len(remainder))
    return Estimate(estimate.value + (Q * AQ).sum(), estimate.error, estimate.products)


def _exact(operator: Any, chunk: int) -> Estimate:
    total = torch.stack([(e * times(operator, e)).sum() for e in units(operator, chunk)]).sum()
    return Estimate(total, torch.zeros_like(total), operator.shape[0])


def split(
    operator: Any, products: int, chunk: int, seed: int, progress: bool = False
) -> tuple[Tensor, Tensor, list[Tensor], int]:
    """An orthonormal sketch of the range, its product, random vectors orthogonal to it, and products used."""
    rank = products // 3
    if rank < 1:
        raise CurvatureError(f"products={products}: three at least")
    Q = torch.linalg.qr(columns(operator, probes(operator, rank, seed=seed), chunk, progress)).Q
    rest = batches(operator, max(2, products - 2 * rank), chunk, seed=seed + 1)
    return Q, columns(operator, Q, chunk, progress), [z - Q @ (Q.T @ z) for z in rest], 2 * rank


def xtrace(operator: Any, *, products: int = 60, chunk: int = 16, seed: int = 0, progress: bool = False) -> Estimate:
    """Hutch++ with every random vector used for both of its parts: the mean over i of

        tr QᵢᵀAQᵢ + (P - m + 1) εᵢᵀAεᵢ / ‖εᵢ‖²,      εᵢ = (I - QᵢQᵢᵀ) zᵢ,

    m = ``products`` / 2, z on the sphere, and Qᵢ a basis of the other m - 1 vectors' images. Memory of 5 m vectors;
    exact for rank below m. ``error`` is the spread over i; the terms not being independent, it is up to 1.5 times too
    small on spectra that decay.

    Source: E. Epperly, J. Tropp, R. Webber, XTrace: making the most of every sample in stochastic trace estimation,
    2024.
    """
    n, m = unknowns(operator), products // 2
    if products >= n:
        return _exact(operator, chunk)
    if m < 2:
        raise CurvatureError(f"products={products}: four at least")
    Z = probes(operator, m, "sphere", seed)
    Y = columns(operator, Z, chunk, progress)
    Q, R = torch.linalg.qr(Y)
    U, S = leave_one_out(R)
    Q = Q @ U
    AQ = columns(operator, Q, chunk, progress)
    coordinates = Q.T @ Z
    coordinates -= S * (S * coordinates).sum(0)  # of QᵢQᵢᵀ zᵢ
    ε, Aε = Z.sub_(Q @ coordinates), Y.sub_(AQ @ coordinates)
    inside = (Q * AQ).sum() - (S * (Q.T @ AQ @ S)).sum(0)
    left = n - Q.shape[1] + S.any(0).long()
    squares = (ε * ε).sum(0)
    outside = torch.where(squares > torch.finfo(Z.dtype).eps * n, left * (ε * Aε).sum(0) / squares, 0)
    return Estimate.mean(inside + outside, m + Q.shape[1])


class Split(NamedTuple):
    """tr H, tr F and tr S, S = H - F."""

    H: Estimate
    F: Estimate
    S: Estimate


def split_traces(
    hessian: Any, gauss_newton: Any, *, products: int = 100, kind: str = "rademacher", chunk: int = 16, seed: int = 0
) -> Split:
    """Traces of H, F and S = H - F by Hutchinson with common random vectors: zᵀSz = zᵀHz - zᵀFz for each.

    The error of tr S is that of the differences, smaller by far than those of tr H and tr F where S is small.
    ``products`` are with each operator.
    """
    pairs = [
        torch.stack([(z * times(hessian, z)).sum(0), (z * times(gauss_newton, z)).sum(0)])
        for z in batches(hessian, products, chunk, kind, seed)
    ]
    h, f = torch.cat(pairs, 1)
    return Split(*(Estimate.mean(samples, products) for samples in (h, f, h - f)))
