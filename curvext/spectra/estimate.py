"""A random estimate with its error, and the random vectors it is made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..progress import shown
from ..solvers.solution import times

PROBES = ("rademacher", "gaussian", "sphere")
SALT = 0xC0FFEE << 8  # the numbers of torch.manual_seed(seed) may be in the operator: these must be others


@dataclass(frozen=True)
class Estimate:
    """A number, or a tensor of numbers, that was estimated from random vectors.

    Attributes:
        value: the estimate.
        error: its standard error, entry by entry, itself estimated from the spread over the random vectors.
        products: products with the operator.
    """

    value: Tensor
    error: Tensor
    products: int

    def __float__(self) -> float:
        return float(self.value)

    @staticmethod
    def mean(samples: Tensor, products: int) -> Estimate:
        """Of independent samples along the first axis."""
        if len(samples) < 2:
            raise CurvatureError("an error bar needs two random vectors at least")
        return Estimate(samples.mean(0), samples.std(0) / len(samples) ** 0.5, products)


def probes(operator: Any, count: int, kind: str = "rademacher", seed: int = 0) -> Tensor:
    """Random columns ``[P, count]`` with E[z zᵀ] = I, in the operator's dtype and on its device.

    ``"rademacher"`` entries are ±1, ``"gaussian"`` standard normal, and ``"sphere"`` columns uniform with ‖z‖² = P.
    """
    return next(batches(operator, count, count, kind, seed))


def batches(operator: Any, count: int, chunk: int, kind: str = "rademacher", seed: int = 0) -> Iterator[Tensor]:
    """The same, ``chunk`` columns at a time."""
    if kind not in PROBES:
        raise CurvatureError(f"probes of kind {kind!r}: one of {', '.join(PROBES)}")
    n = unknowns(operator)
    if count < 1:
        raise CurvatureError(f"{count} random vectors: one at least")
    generator = torch.Generator(operator.device).manual_seed(SALT + seed)
    for start in range(0, count, chunk):
        width = min(chunk, count - start)
        yield torch.stack([_probe(operator, n, kind, generator) for _ in range(width)], 1)


def _probe(operator: Any, n: int, kind: str, generator: torch.Generator) -> Tensor:
    options: dict[str, Any] = {"generator": generator, "device": operator.device, "dtype": operator.dtype}
    if kind == "rademacher":
        return 2 * torch.randint(0, 2, (n,), **options) - 1
    z = torch.randn(n, **options)
    return z * (n**0.5 / torch.linalg.vector_norm(z)) if kind == "sphere" else z


def columns(operator: Any, Z: Tensor, chunk: int, progress: bool = False) -> Tensor:
    """A Z, ``chunk`` columns at a time."""
    return torch.cat([times(operator, z) for z in shown(Z.split(chunk, dim=1), progress, "products")], 1)


def unknowns(operator: Any) -> int:
    """P of an operator ``[P, P]``."""
    m, n = operator.shape
    if m != n:
        raise CurvatureError(f"a square operator is needed, not one of shape ({m}, {n})")
    return int(n)


def units(operator: Any, chunk: int) -> Iterator[Tensor]:
    """The unit vectors, ``chunk`` columns at a time: with as many products as unknowns, nothing is left to chance."""
    n = unknowns(operator)
    for start in range(0, n, chunk):
        unit = torch.zeros(n, min(chunk, n - start), dtype=operator.dtype, device=operator.device)
        unit[start:].fill_diagonal_(1)
        yield unit


def leave_one_out(R: Tensor) -> tuple[Tensor, Tensor]:
    """From Y = Q R: how to leave a column of Y out of its range.

    Returns ``(U, S)``, U ``[m, r]`` and S ``[r, m]``: Q U is an orthonormal basis of range(Y), numerically, and that of
    all columns but the i-th is its part orthogonal to Q U Sᵢ; Sᵢ is zero where Y has lost rank, so that one column is
    not missed.
    """
    U, s, _ = torch.linalg.svd(R)
    full = s > 10 * len(s) * torch.finfo(s.dtype).eps * s[:1]
    r = int(full.sum())
    U = U[:, :r]
    if r < len(s):
        return U, U.new_zeros(r, len(s))
    S = torch.linalg.solve_triangular(R.T, torch.eye(r, dtype=R.dtype, device=R.device), upper=False)
    return U, torch.nn.functional.normalize(U.T @ S, dim=0)
