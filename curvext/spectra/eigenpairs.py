"""Eigenvalues and eigenvectors at the ends of a spectrum, and how far two sets of vectors span the same space."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from ..solvers.block_lanczos import Eigenpairs, block_lanczos
from .estimate import probes


def eigenpairs(
    operator: Any,
    k: int,
    *,
    which: str = "largest",
    tolerance: float = 1e-6,
    block: int = 1,
    basis: int | None = None,
    products: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Eigenpairs:
    """k eigenpairs of a symmetric operator, from a random start; ``.accepted`` says which ones to trust.

    Args:
        operator: A, anything with ``.shape``, ``.dtype``, ``.device`` and ``@`` on columns.
        k: how many; of ``"both"``, at each end.
        which: ``"largest"``, ``"smallest"``, ``"both"`` (by value) or ``"magnitude"``.
        tolerance: of residuals, relative to the largest eigenvalue met.
        block: columns multiplied at once: as many vectors of a multiple eigenvalue can be found.
        basis: vectors kept in memory; max(3 k, 40) + 2 ``block`` if not given.
        products: at most.
        seed: of the start.
        checkpoint: a file to go on from after an interruption.
        progress: show a bar (tqdm).
    """
    start = probes(operator, block, "gaussian", seed)
    options: dict[str, Any] = {"basis": basis, "products": products, "checkpoint": checkpoint, "progress": progress}
    return block_lanczos(operator, start, k, which=which, tolerance=tolerance, **options)


def overlap(U: Tensor, V: Tensor) -> Tensor:
    """Squared cosines ``[k, l]`` between two sets of orthonormal columns, such as eigenvectors at two times.

    ``overlap(U, V).sum() / k`` is the part of U's space within V's: 1 if it is contained, about l / P for random ones.

    Source: G. Gur-Ari, D. Roberts, E. Dyer, Gradient descent happens in a tiny subspace, 2018.
    """
    return (U.T @ V) ** 2
