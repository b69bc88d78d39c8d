"""Products with a parameter's own block of a curvature matrix, as functions ``[V, *P] -> [V, *P]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..factor import Diagonal
from ..persample import Dense, PerSample
from ..rules.default import quiet_vmap
from ..wave import Wave
from .base import Saved, Target, WholeGraph
from .bends import BendFactor
from .ggn import _Exact, _FactorReading
from .hessian import differentiated_twice, refuse_mistaken
from .readings import Arrived


@dataclass(frozen=True, eq=False)
class BlockProduct:
    """A function ``[V, *P] -> [V, *P]``: V products with a matrix, the sum of ``terms``.

    Raises:
        ValueError: if what is given is not of the shape ``[V, *P]``.
    """

    terms: tuple[Callable[[Tensor], Tensor], ...]
    shape: tuple[int, ...]

    def __call__(self, vectors: Tensor) -> Tensor:
        if tuple(vectors.shape[1:]) != self.shape or vectors.dim() != len(self.shape) + 1:
            raise ValueError(
                f"expected vectors [V, {', '.join(map(str, self.shape))}], got {tuple(vectors.shape)}; one is v[None]"
            )
        total = torch.zeros_like(vectors)
        for term in self.terms:
            total = total + term(vectors)
        return total

    def __add__(self, other: BlockProduct) -> BlockProduct:
        return BlockProduct(self.terms + other.terms, self.shape)


class _Products(Saved):
    """What quantities that are functions have in common."""

    def zero(self, target: Target) -> BlockProduct:
        return BlockProduct((), tuple(target.tensor.shape))


class _OfColumns(_Products, _FactorReading):
    def of(self, found: Arrived, target: Target) -> BlockProduct:
        values = (*found.samples, *found.whole, *found.diagonal)
        return BlockProduct(tuple(_product(value) for value in values), tuple(target.tensor.shape))


def _product(value: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(value, Diagonal):
        return value.h.mul
    return (value if isinstance(value, PerSample) else Dense(value.columns.unsqueeze(1))).product


@dataclass(frozen=True)
class GGNMP(_Exact, _OfColumns):
    """Products with the parameter's block of the Gauss-Newton matrix: ``p.ggnmp(v)`` for v ``[V, *P]``.

    The function holds the columns JᵀS, at a layer's weight as the factors of their outer products, and needs no graph.
    """

    savefield = "ggnmp"


@dataclass(frozen=True)
class PCHMP(_OfColumns):
    """Products with the parameter's block of the positive-curvature Hessian: ``p.pchmp(v)`` for v ``[V, *P]``.

    H = Σ JᵀBJ over all operations that bend (:mod:`curvext.quantities.bends`), with the eigenvalues of every B changed
    so that none is negative. For elementwise functions B = diag(φ'' g). BackPACK's products have g twice there.

    Args:
        modify: ``"clip"``: negative eigenvalues are left out; ``"abs"``: their sign is.

    Raises:
        ValueError: for another ``modify``.
        CurvatureError: in ``backward()``, if a weight is put together with what was computed from it (tied or recurrent
            weights): its block is more than that sum; and if samples depend on each other.

    Source: Chen, Chou & Chang, BDA-PCH, 2018, https://arxiv.org/abs/1802.06502.
    """

    modify: str = "clip"
    savefield = "pchmp"

    def __post_init__(self) -> None:
        if self.modify not in ("clip", "abs"):
            raise ValueError(f"PCHMP: modify must be 'clip' or 'abs', got {self.modify!r}")

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (BendFactor(part="positive" if self.modify == "clip" else "abs"),)


@dataclass(frozen=True)
class HMP(_Products, WholeGraph):
    """Products with the parameter's block of the Hessian: ``p.hmp(v)`` for v ``[V, *P]``; exact on any graph.

    The function differentiates the gradient once more: the graph of loss and gradient stays in memory as long as one
    of the functions does, so delete them (``del p.hmp``) when they are no longer needed; a new block does.

    Raises:
        CurvatureError: if an operation of the graph cannot be differentiated twice, or PyTorch does so wrongly.
    """

    savefield = "hmp"
    retains: ClassVar[bool] = True

    def compute(self, loss: Tensor, scale: Tensor | None, targets: Sequence[Tensor]) -> list[Any]:
        refuse_mistaken(loss, "HMP")
        with differentiated_twice("HMP"):
            gradients = torch.autograd.grad(loss, targets, scale, create_graph=True, allow_unused=True)
        return [
            None if g is None or not g.requires_grad else BlockProduct((_Differentiated(g, x),), tuple(x.shape))
            for g, x in zip(gradients, targets, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Differentiated:
    gradient: Tensor
    x: Tensor

    def __call__(self, vectors: Tensor) -> Tensor:
        with differentiated_twice("HMP"), quiet_vmap():
            (products,) = torch.autograd.grad(
                self.gradient, self.x, vectors, is_grads_batched=True, retain_graph=True, allow_unused=True
            )
        return torch.zeros_like(vectors) if products is None else products.detach()
