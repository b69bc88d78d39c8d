"""The density of a spectrum by stochastic Lanczos quadrature, and traces of functions that follow from it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..progress import Checkpoint, shown
from ..solvers.lanczos import lanczos
from ..solvers.solution import times
from .estimate import Estimate, batches


@dataclass(frozen=True)
class Density:
    """Gauss quadratures of the spectral measure, one a random vector: (1/P) tr f(A) ≈ Σ weights f(nodes).

    Attributes:
        nodes: Ritz values ``[probes, steps]``, float64 on the host.
        weights: ``[probes, steps]``, adding up to 1 for each probe.
        size: P.
        products: with the operator.

    All errors are standard errors over the probes. What quadrature leaves out is none for polynomials below degree 2
    ``steps``.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int

    def trace(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """tr f(A)."""
        return self._mean(self.size * (self.weights * f(self.nodes)).sum(1))

    def moment(self, degree: int) -> Estimate:
        """(1/P) tr Aᵈ, free of quadrature error for d < 2 ``steps``."""
        return self._mean((self.weights * self.nodes**degree).sum(1))

    def log_determinant(self, damping: float = 0.0) -> Estimate:
        """log det (A + δ I) = tr log(A + δ I)."""
        self._positive(damping)
        return self.trace(lambda t: torch.log(t + damping))

    def effective_dimension(self, damping: float) -> Estimate:
        """tr A (A + δ I)⁻¹: how many directions the data determine against a prior of precision δ."""
        self._positive(damping)
        return self.trace(lambda t: t / (t + damping))

    def __call__(self, grid: Tensor, width: float | None = None) -> Estimate:
        """φ(t) at the points of ``grid``; it integrates to one.

        Every node is a normal density of standard deviation ``width``, 0.3% of the spectrum's range if not given.
        """
        width = self.width if width is None else width
        far = (grid.to(self.nodes)[:, None, None] - self.nodes) / width
        bells = torch.exp(-(far**2) / 2) / (width * math.sqrt(2 * math.pi))
        return self._mean((self.weights * bells).sum(2).T)

    def grid(self, points: int = 2000, width: float | None = None) -> Tensor:
        """Evenly spaced points that hold all of the density."""
        margin = 5 * (self.width if width is None else width)
        return torch.linspace(
            float(self.nodes.min()) - margin, float(self.nodes.max()) + margin, points, dtype=torch.float64
        )

    @property
    def width(self) -> float:
        """10^-2.5 of the range of the nodes, or of their size where all are the same."""
        reach, size = float(self.nodes.max() - self.nodes.min()), float(self.nodes.abs().max())
        return 10**-2.5 * (reach if reach > 1e-6 * size else size or 1.0)

    def _mean(self, samples: Tensor) -> Estimate:
        return Estimate.mean(samples, self.products)

    def _positive(self, damping: float) -> None:
        lowest = float(self.nodes.min())
        if lowest + damping <= 0:
            raise CurvatureError(
                f"A + {damping} I is not positive definite: a Ritz value of A is {lowest:.3g}. Give more damping, or a "
                "Gauss-Newton operator instead of a Hessian"
            )


def density(
    operator: Any,
    *,
    probes: int = 10,
    steps: int = 80,
    reorthogonalize: str = "full",
    kind: str = "sphere",
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Density:
    """The spectral density of a symmetric operator: ``steps`` Lanczos steps from each of ``probes`` random vectors.

    Args:
        operator: A, anything with ``.shape``, ``.dtype``, ``.device`` and ``@``.
        probes: random vectors; errors fall with their root, and with that of P.
        steps: products each, and degrees of resolution.
        reorthogonalize: ``"full"`` keeps ``steps`` vectors in memory, ``"none"`` six: copies of converged nodes then
            share their weight, which a density does not mind.
        kind: ``"sphere"``, ``"gaussian"`` or ``"rademacher"``.
        seed: of the random vectors.
        checkpoint: a file to go on from after an interruption, to the step (it has a companion while a probe is under
            way).
        progress: show a bar (tqdm).

    Sources: L. Lin, Y. Saad, C. Yang, Approximating spectral densities of large matrices, 2016; B. Ghorbani, S.
        Krishnan, Y. Xiao,
    An investigation into neural net optimization via Hessian eigenvalue density, 2019.
    """
    n = operator.shape[0]
    problem = {"size": n, "steps": steps, "kind": kind, "seed": seed, "reorthogonalize": reorthogonalize}
    file = Checkpoint(checkpoint, every=1, **problem)
    state = file.load() or {"nodes": [], "weights": [], "products": 0}
    done = len(state["nodes"])
    companion = None if checkpoint is None else Path(f"{checkpoint}.probe")
    with file.keeping(lambda: state) as finished:
        for i, z in enumerate(shown(batches(operator, probes, 1, kind, seed), progress, "density", probes)):
            if i == 0 < done:
                _same_operator(operator, z.squeeze(1), state["nodes"][0] @ state["weights"][0])
            if i < done:
                continue
            nodes, weights, products = _quadrature(operator, z.squeeze(1), steps, reorthogonalize, companion)
            state = {
                "nodes": [*state["nodes"], nodes],
                "weights": [*state["weights"], weights],
                "products": state["products"] + products,
            }
            finished()
            if companion is not None:
                companion.unlink(missing_ok=True)
    nodes, weights = _even(state["nodes"][:probes]), _even(state["weights"][:probes], zeros=True)
    return Density(nodes, weights, n, state["products"])


def _quadrature(operator: Any, z: Tensor, steps: int, how: str, file: Path | None) -> tuple[Tensor, Tensor, int]:
    """Nodes, weights and products of one probe, without the basis."""
    krylov = lanczos(operator, z, steps=steps, reorthogonalize=how, keep=how != "none", checkpoint=file)
    return krylov.values, krylov.weights, krylov.products


def _same_operator(operator: Any, z: Tensor, mean: Tensor) -> None:
    """One product tells whether a checkpoint's first quadrature, whose mean is zᵀAz / zᵀz, is this operator's."""
    q = z / torch.linalg.vector_norm(z)
    product = times(operator, q)
    rounding = torch.finfo(z.dtype).eps ** 0.5
    if not abs(float(q @ product) - float(mean)) <= rounding * float(torch.linalg.vector_norm(product)):
        raise CurvatureError("the checkpoint belongs to another operator: its first product differs")


def _even(rows: list[Tensor], zeros: bool = False) -> Tensor:
    """Rows of one length: some end early, and go on with nodes of weight zero."""
    longest = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, (0 if zeros else 1) * row[-1:].expand(longest - len(row))]) for row in rows])


def log_determinant(operator: Any, damping: float = 0.0, **options: Any) -> Estimate:
    """log det (A + δ I) by :func:`density`; for several δ, take :meth:`Density.log_determinant` of one density."""
    return density(operator, **options).log_determinant(damping)


def effective_dimension(operator: Any, damping: float, **options: Any) -> Estimate:
    """tr A (A + δ I)⁻¹ by :func:`density`; for several δ, take :meth:`Density.effective_dimension` of one density."""
    return density(operator, **options).effective_dimension(damping)
