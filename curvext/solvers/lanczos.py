"""The Lanczos process: a symmetric operator seen from one vector."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..linalg import eigh
from ..progress import Checkpoint, shown
from .solution import check, times

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Krylov:
    """A Q = Q T + β q eᵀ: orthonormal columns Q, the first along the start b, and T tridiagonal.

    Attributes:
        basis: Q ``[P, k]``, or ``None`` where it was not kept.
        alpha, beta: the diagonal of T ``[k]`` and what stands beside it, β last ``[k]``; float64, on the host.
        length: ‖b‖.
        products: with the operator, those before an interruption included.
        invariant: whether β vanished, so that all below is exact.
    """

    basis: Tensor | None
    alpha: Tensor
    beta: Tensor
    length: float
    products: int
    invariant: bool

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        beside = self.beta[:-1]
        tridiagonal = self.alpha.diag() + beside.diag(1) + beside.diag(-1)
        values, vectors = eigh(tridiagonal)
        return values, vectors

    @property
    def values(self) -> Tensor:
        """Ritz values ``[k]``, ascending."""
        return self._eigh[0]

    @property
    def weights(self) -> Tensor:
        """``[k]``, of the Gauss quadrature: bᵀ f(A) b ≈ ‖b‖² Σ weights f(values)."""
        return self._eigh[1][0] ** 2

    @property
    def residuals(self) -> Tensor:
        """``[k]``: ‖A y - τ y‖ of every Ritz pair, |β uₘᵢ|. An eigenvalue of A lies that near to τ."""
        return (self.beta[-1] * self._eigh[1][-1]).abs()

    def vectors(self, which: Tensor | slice = slice(None)) -> Tensor:
        """Ritz vectors ``[P, k]``, or those that an index picks."""
        return self._basis @ self._eigh[1][:, which].to(self._basis)

    def function(self, f: Function) -> Tensor:
        """f(A) b ≈ ‖b‖ Q f(T) e₁, exact for polynomials below degree k."""
        return self._basis @ self.coordinates(f).to(self._basis)

    def coordinates(self, f: Function) -> Tensor:
        """‖b‖ f(T) e₁ ``[k]``."""
        values, vectors = self._eigh
        return self.length * vectors @ (f(values) * vectors[0])

    def quadratic(self, f: Function) -> float:
        """bᵀ f(A) b ≈ ‖b‖² e₁ᵀ f(T) e₁, exact for polynomials below degree 2k."""
        return self.length**2 * float(self.weights @ f(self.values))

    @property
    def _basis(self) -> Tensor:
        if self.basis is None:
            raise CurvatureError("this Lanczos run did not keep its basis: no vectors; keep=True keeps it")
        return self.basis


def lanczos(
    operator: Any,
    b: Tensor,
    *,
    steps: int,
    reorthogonalize: str = "full",
    keep: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Krylov:
    """``steps`` Lanczos steps on a symmetric operator from b: one product each.

    Ends early where the Krylov space is exhausted. Without reorthogonalisation, converged Ritz values come again as
    copies ("ghosts"): their residuals are as small as the true ones', only the count is wrong.

    Args:
        operator: A, anything with ``.shape`` and ``@``.
        b: ``[P]``, not zero.
        steps: at most P are done.
        reorthogonalize: ``"full"``: every new vector, twice, against all; 4 P k operations at step k. ``"selective"``:
            against the Ritz vectors that have converged to √ε ‖A‖, which is where orthogonality gets lost (Parlett and
            Scott 1979); it holds to √ε. ``"none"``.
        keep: whether to keep the basis, ``steps`` vectors; without it, ``reorthogonalize`` must be ``"none"``.
        checkpoint: a file to go on from after an interruption, or with more ``steps``; one product on return tells
            whether the operator is the same.
        progress: show a bar (tqdm).

    Source: G. Golub and C. Van Loan, Matrix Computations, chapter 10.
    """
    b = check(operator, b)
    if reorthogonalize not in ("full", "selective", "none") or (not keep and reorthogonalize != "none"):
        raise CurvatureError(
            f"reorthogonalize={reorthogonalize!r}, keep={keep}: 'full', 'selective' or 'none', and 'none' if not kept"
        )
    run = _Run(operator, b, min(steps, len(b)), reorthogonalize, keep)
    file = Checkpoint(checkpoint, b=b, reorthogonalize=reorthogonalize, keep=keep)
    run.resume(file.load(b.device))
    with file.keeping(run.state) as done:
        for _ in shown(run.steps(), progress, "Lanczos", run.limit, len(run.alpha)):
            done()
    return run.result()


def replay(operator: Any, b: Tensor, krylov: Krylov) -> Iterator[Tensor]:
    """The vectors of a run without reorthogonalisation, once more and one at a time, for k - 1 products."""
    alpha, beta = krylov.alpha.tolist(), krylov.beta.tolist()
    before, q = torch.zeros_like(b), b / krylov.length
    for k in range(len(alpha)):
        if k:
            w = times(operator, q) - (beta[k - 2] * before if k > 1 else 0)
            before, q = q, (w - alpha[k - 1] * q) / beta[k - 1]
        yield q


class _Run:
    """A Lanczos run in flight: rows of ``basis`` are the vectors so far and the next one."""

    def __init__(self, operator: Any, b: Tensor, limit: int, reorthogonalize: str, keep: bool):
        self.operator, self.b, self.limit, self.how, self.keep = operator, b, limit, reorthogonalize, keep
        self.length = float(torch.linalg.vector_norm(b))
        if not 0 < self.length < float("inf"):
            raise CurvatureError(f"Lanczos needs a finite start that is not zero; its norm is {self.length}")
        self.basis = b.new_empty(limit + 1 if keep else 2, len(b))
        self.basis[0] = b / self.length
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.converged = b.new_empty(0, len(b))  # Ritz vectors, for selective orthogonalisation
        self.products = 0
        self.whole = True  # whether what is above belongs together

    def steps(self) -> Iterator[None]:
        while len(self.alpha) < self.limit and not self.invariant:
            self.step()
            yield

    def step(self) -> None:
        k = len(self.alpha)
        q, before = self._row(k), self._row(k - 1)
        w = times(self.operator, q)
        self.products += 1
        if k:
            w = w - self.beta[-1] * before
        alpha = float(w @ q)
        w = w - alpha * q
        for _ in range(2 if self.how == "full" else 0):
            w -= self.basis[: k + 1].T @ (self.basis[: k + 1] @ w)
        if self.how == "selective":
            w -= self.converged.T @ (self.converged @ w)
        beta = float(torch.linalg.vector_norm(w))
        if not beta < float("inf"):
            raise CurvatureError(f"a product of the operator is not finite, at Lanczos step {k + 1}")
        self.whole = False
        self.alpha.append(alpha)
        self.beta.append(beta)
        self._row(k + 1)[:] = w / beta if beta else 0
        if self.how == "selective" and beta:
            self._select()
        self.whole = True

    def _row(self, k: int) -> Tensor:
        return self.basis[k if self.keep else k % 2]

    def _select(self) -> None:
        """Ritz vectors that have converged to half the digits: the next vectors lose orthogonality along them."""
        so_far = self.result()
        eps = torch.finfo(self.basis.dtype).eps
        good = so_far.residuals < eps**0.5 * so_far.values.abs().max()
        if int(good.sum()) > len(self.converged):
            self.converged = so_far.vectors(good).T
            w = self._row(len(self.alpha))
            w -= self.converged.T @ (self.converged @ w)
            w /= torch.linalg.vector_norm(w)

    @property
    def invariant(self) -> bool:
        """Whether β is nothing beside T."""
        if not self.alpha:
            return False
        size = max(abs(a) + b for a, b in zip(self.alpha, [*self.beta[:-1], 0.0], strict=True))
        return self.beta[-1] <= 100 * torch.finfo(self.basis.dtype).eps * size

    def result(self) -> Krylov:
        alpha, beta = (torch.tensor(x, dtype=torch.float64) for x in (self.alpha, self.beta))
        basis = self.basis[: len(alpha)].T if self.keep else None
        return Krylov(basis, alpha, beta, self.length, self.products, self.invariant)

    def state(self) -> dict[str, Any]:
        if not self.whole:
            return {}
        kept = min(len(self.alpha) + 1, len(self.basis))
        small = {"alpha": self.alpha, "beta": self.beta, "products": self.products}
        return small | {"basis": self.basis[:kept].clone(), "converged": self.converged.clone()}

    def resume(self, state: dict[str, Any]) -> None:
        if not state or not state["alpha"]:
            return
        done = min(len(state["alpha"]), self.limit)
        kept = min(done + 1, len(self.basis))
        self.basis[:kept] = state["basis"][:kept]
        self.alpha, self.beta, self.converged = state["alpha"][:done], state["beta"][:done], state["converged"]
        self.products = state["products"]
        self._same_operator(self.b / self.length)

    def _same_operator(self, first: Tensor) -> None:
        product = times(self.operator, first)
        self.products += 1
        away = abs(float(first @ product) - self.alpha[0])
        if not away <= torch.finfo(first.dtype).eps ** 0.5 * float(torch.linalg.vector_norm(product)):
            raise CurvatureError("the checkpoint belongs to another operator: its first product differs")
