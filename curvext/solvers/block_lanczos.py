"""Extremal eigenpairs by block Lanczos with thick restarts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..linalg import eigh
from ..progress import Checkpoint, shown
from .solution import check, times

ENDS = ("largest", "smallest", "both", "magnitude")


@dataclass(frozen=True)
class Eigenpairs:
    """Ritz pairs of a symmetric operator.

    Attributes:
        values: ``[k]``: of ``"smallest"`` ascending, of ``"magnitude"`` by magnitude, else descending.
        vectors: ``[P, k]``, orthonormal columns.
        residuals: ``[k]``, ‖A y - τ y‖: an eigenvalue of A lies that near to τ.
        accepted: ``[k]``, which of them meet the tolerance.
        converged: whether all do.
        products: columns multiplied.
        reason: ``"tolerance"``, ``"exact"`` (the basis spans the whole space) or ``"products"``.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    accepted: Tensor
    converged: bool
    products: int
    reason: str


def block_lanczos(
    operator: Any,
    start: Tensor,
    k: int,
    *,
    which: str = "largest",
    tolerance: float = 1e-6,
    basis: int | None = None,
    products: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Eigenpairs:
    """k eigenpairs at an end of a symmetric operator's spectrum, or at both, from the columns of ``start``.

    Rayleigh and Ritz on the block Krylov space, fully reorthogonalised. A full basis is restarted from its best Ritz
    vectors. One column finds one vector of a multiple eigenvalue; b columns find b, and
    cost less a column where the operator batches its products.

    Args:
        operator: A, anything with ``.shape`` and ``@`` on columns.
        start: ``[P]`` or ``[P, b]``, random.
        k: how many pairs; of ``"both"``, at each end.
        which: ``"largest"``, ``"smallest"``, ``"both"`` (by value) or ``"magnitude"``.
        tolerance: a pair is accepted where its residual is below ``tolerance`` times the largest |τ|. Its eigenvalue is
            then right to that, and to its square over the gap.
        basis: vectors kept: memory of basis + b vectors; max(3 k, 40) + 2 b if not given.
        products: at most; no limit but 50 bases if not given.
        checkpoint: a file to go on from after an interruption; one product tells whether the operator is the same.
        progress: show a bar of products (tqdm).

    ``torch.lobpcg`` wants a matrix as a tensor, and SciPy's solvers leave the device.

    Sources: K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000; G. W.
    Stewart, A Krylov-Schur algorithm for large eigenproblems, 2001.
    """
    start = start.unsqueeze(1) if start.dim() == 1 else start
    start = check(operator, start, columns=True)
    P, b = start.shape
    wanted = 2 * k if which == "both" else k
    if which not in ENDS or not 0 < wanted <= P or not 0 < b <= P:
        raise CurvatureError(f"k={k}, which={which!r}, {b} columns for {P} unknowns: which is one of {', '.join(ENDS)}")
    size = min(P, max(3 * wanted, 40) + 2 * b if basis is None else basis)
    if size < min(P, wanted + 2 * b):
        raise CurvatureError(f"basis={basis}: {wanted} pairs with {b} columns need {wanted + 2 * b} at least")
    run = _Run(operator, start, wanted, which, tolerance, size, 50 * size if products is None else products)
    file = Checkpoint(checkpoint, every=max(1, 10 // b), start=start, which=which, k=k)
    run.resume(file.load(start.device))
    with file.keeping(run.state) as done:
        for _ in shown(run.steps(), progress, "block Lanczos"):
            done()
    return run.result()


class _Run:
    """Rows of ``Q``: ``m`` orthonormal vectors whose products are in T = Q A Qᵀ, then the next ``width``.

    A Qᵀ = Qᵀ T + (next rows)ᵀ coupling. What is small, T ``[m, m]`` and coupling ``[width, m]``, is float64 on the
    host.
    """

    def __init__(self, operator: Any, start: Tensor, k: int, which: str, tolerance: float, size: int, products: int):
        self.operator, self.k, self.which, self.tolerance, self.limit = operator, k, which, tolerance, products
        P, self.width = start.shape
        self.size, self.most = size, self.width
        self.Q = start.new_empty(min(P, size + self.width), P)
        self.Q[: self.width] = torch.linalg.qr(start).Q.T
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self.m = self.products = 0
        self.random = torch.Generator().manual_seed(0)
        self.whole = True  # whether what is above belongs together

    def steps(self) -> Iterator[None]:
        while not self.reason:
            if self.m + self.width > self.size:
                self.whole = False
                self.restart()
                self.whole = True
            self.step()
            yield

    def step(self) -> None:
        """Multiply the next rows, orthogonalise what comes out, and take it as the next."""
        Q = self.Q[: self.m + self.width]
        W = times(self.operator, Q[self.m :].T).T
        self.products += self.width
        T = W @ Q.T
        W = W - T @ Q
        again = W @ Q.T
        W, T = W - again @ Q, _host(T + again)
        if not bool(T.isfinite().all()):
            raise CurvatureError(f"a product of the operator is not finite, after {self.products} products")
        self.whole = False
        right, below = T[:, : self.m], T[:, self.m :]
        self.T = torch.cat([torch.cat([self.T, right.T], 1), torch.cat([right, (below + below.T) / 2], 1)])
        self.m = len(self.T)
        self._follow(W)
        self._diagonalise()
        self.whole = True

    def _follow(self, W: Tensor) -> None:
        """W = (next rows)ᵀ R: fewer rows where the space ends, random ones where W has lost rank."""
        rows, R = torch.linalg.qr(W.T)
        U, s, V = torch.linalg.svd(R)
        width = min(len(W), W.shape[1] - self.m)
        rows, R = (rows @ U).T[:width], _host((s.unsqueeze(1) * V)[:width])
        lost = torch.linalg.vector_norm(R, dim=1) <= 100 * torch.finfo(W.dtype).eps * self.T.abs().max()
        if bool(lost.any()):
            R = R.masked_fill(lost.unsqueeze(1), 0)
            rows = self._refilled(rows, lost.to(rows.device))
        self.coupling = R.new_zeros(width, self.m)
        self.coupling[:, self.m - len(W) :] = R
        self.width = width
        self.Q[self.m : self.m + width] = rows

    def _refilled(self, rows: Tensor, lost: Tensor) -> Tensor:
        """Random rows, orthogonal to all others, in place of the lost ones."""
        others = torch.cat([self.Q[: self.m], rows[~lost]])
        draws = torch.randn(int(lost.sum()), rows.shape[1], generator=self.random, dtype=torch.float64).to(rows)
        for _ in range(2):
            draws = torch.linalg.qr((draws - (draws @ others.T) @ others).T).Q.T
        return rows.index_put((lost,), draws)

    def _diagonalise(self) -> None:
        """Ritz values, their vectors in the basis, and their residuals: the wanted ones first."""
        values, vectors = eigh(self.T)
        order = _order(values, self.which)
        self.values, self.vectors = values[order], vectors[:, order]
        self.residuals = torch.linalg.vector_norm(self.coupling @ self.vectors, dim=0)
        self.accepted = self.residuals <= self.tolerance * values.abs().max()

    def restart(self) -> None:
        """Keep the best Ritz vectors, about half, and the next rows behind them."""
        keep = min(self.size - self.most, self.k + (self.m - self.k) // 2)
        best, after = self.vectors[:, :keep], self.Q[self.m : self.m + self.width].clone()
        for part in self.Q.split(1 << 16, dim=1):  # in place, without a second basis
            part[:keep] = best.T.to(self.Q) @ part[: self.m]
        self.Q[keep : keep + self.width] = after
        self.T, self.coupling, self.m = self.values[:keep].diag(), self.coupling @ best, keep

    @property
    def reason(self) -> str:
        if self.m == self.Q.shape[1]:
            return "exact"
        if self.m >= self.k and bool(self.accepted[: self.k].all()):
            return "tolerance"
        return "products" if self.products >= self.limit else ""

    def result(self) -> Eigenpairs:
        reason, k = self.reason, min(self.k, self.m)
        order = self.values[:k].argsort(descending=True) if self.which == "both" else torch.arange(k)
        values, residuals, accepted = self.values[order], self.residuals[order], self.accepted[order]
        vectors = self.Q[: self.m].T @ self.vectors[:, order].to(self.Q)
        converged = k == self.k and bool(accepted.all())
        values, residuals = values.to(self.Q), residuals.to(self.Q)
        return Eigenpairs(values, vectors, residuals, accepted, converged, self.products, reason)

    def state(self) -> dict[str, Any]:
        if not self.whole:
            return {}
        kept = {"Q": self.Q[: self.m + self.width].clone(), "T": self.T, "products": self.products}
        return kept | ({"coupling": self.coupling} if self.m else {})

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a state whose basis fits."""
        if not state or not len(state["T"]):
            return
        m, rows = len(state["T"]), len(state["Q"])
        if m > self.size:
            raise CurvatureError(f"the checkpoint holds {m} vectors, this basis {self.size}; give basis={m} or more")
        self.Q[:rows], self.m, self.width = state["Q"], m, rows - m
        self.T, self.coupling = _host(state["T"]), _host(state["coupling"])
        self._diagonalise()
        self.products = state["products"] + 1
        product = times(self.operator, self.Q[0])
        away = abs(float(self.Q[0] @ product) - float(self.T[0, 0]))
        if not away <= torch.finfo(product.dtype).eps ** 0.5 * float(torch.linalg.vector_norm(product)):
            raise CurvatureError("the checkpoint belongs to another operator: a product differs")


def _host(x: Tensor) -> Tensor:
    return x.to("cpu", torch.float64)


def _order(values: Tensor, which: str) -> Tensor:
    """Indices into ascending values, the wanted ones first."""
    if which == "magnitude":
        return values.abs().argsort(descending=True)
    up = torch.arange(len(values))
    down = up.flip(0)
    if which == "both":
        return torch.stack([down, up], 1).flatten()[: len(values)]
    return up if which == "smallest" else down
