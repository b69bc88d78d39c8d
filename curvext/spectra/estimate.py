"""A random estimate with its error, and the random vectors it is made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError

PROBES = ("rademacher", "gaussian", "sphere")


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
    m, n = operator.shape
    if m != n or count < 1:
        raise CurvatureError(
            f"{count} random vectors for an operator of shape ({m}, {n}): one at least, and a square one"
        )
    generator = torch.Generator(operator.device).manual_seed(seed)
    for start in range(0, count, chunk):
        shape = (min(chunk, count - start), n)
        options: dict[str, Any] = {"generator": generator, "device": operator.device, "dtype": operator.dtype}
        if kind == "rademacher":
            yield (2 * torch.randint(0, 2, shape, **options) - 1).T
        else:
            z = torch.randn(shape, **options)
            yield (z * (n**0.5 / torch.linalg.vector_norm(z, dim=1, keepdim=True)) if kind == "sphere" else z).T


def leave_one_out(R: Tensor) -> tuple[Tensor, Tensor]:
    """From Y = Q R: how to leave a column of Y out of its range.

    Returns ``(U, S)``, U ``[m, r]`` and S ``[r, m]``: Q U is an orthonormal basis of range(Y), numerically, and that of
    all columns but the i-th is its part orthogonal to Q U Sᵢ; Sᵢ is zero where Y has lost rank, so that one column is
    not missed.
    """
    U, s, _ = torch.linalg.svd(R)
    full = s > len(s) * torch.finfo(s.dtype).eps * s[:1]
    r = int(full.sum())
    U = U[:, :r]
    if r < len(s):
        return U, U.new_zeros(r, len(s))
    S = torch.linalg.solve_triangular(R.T, torch.eye(r, dtype=R.dtype, device=R.device), upper=False)
    return U, torch.nn.functional.normalize(U.T @ S, dim=0)
