"""Eigenvalues of symmetric matrices, checked.

LAPACK's divide and conquer, in single precision, may return NaN for a finite matrix, without an error: the second
moment of 128 images of MNIST is one. Then the matrix is decomposed in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import CurvatureError
from .hessians import tracing


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[..., d]``, ascending, and eigenvectors as columns ``[..., d, d]`` of symmetric matrices.

    Raises:
        CurvatureError: if ``a`` has entries that are not finite, or the decomposition fails in double precision too.
    """
    values, vectors = _checked(torch.linalg.eigh, a)
    return values, vectors


def eigvalsh(a: Tensor) -> Tensor:
    """The eigenvalues alone; see :func:`eigh`."""
    (values,) = _checked(lambda matrix: (torch.linalg.eigvalsh(matrix),), a)
    return values


def _checked(decompose: Callable[[Tensor], Sequence[Tensor]], a: Tensor) -> list[Tensor]:
    if tracing():
        return list(decompose(a))
    for dtype in (torch.promote_types(a.dtype, torch.float32), torch.float64):  # there is no LAPACK in 16 bits
        try:
            found = decompose(a.to(dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if all([bool(part.isfinite().all()) for part in found]):
            return [part.to(a.dtype) for part in found]
    wrong = int((~a.isfinite()).sum())
    why = f"{wrong} entries are not finite. Has the training diverged?" if wrong else "they do not converge in double."
    raise CurvatureError(f"the eigenvalues of a matrix of shape {list(a.shape)} cannot be had: {why}")
