"""Diagonal curvature in one backward pass: HesScale and its refinements, and Becker and LeCun's rule of 1989."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..diagonal import Waves, bends, pass_diagonal
from ..factor import mixes
from ..graph import Edge, Operation
from ..output import Output
from ..sources import is_layer, starts
from ..wave import Wave
from .base import Carried, Quantity, Target, positive
from .readings import squared
from .waves import Factor

KINDS = (None, "last_layer", "exact", "mc")


class _Zero:
    """A wave that is zero, but below the loss's topmost nonlinear operation."""


ZERO = _Zero()


@dataclass(frozen=True)
class Diagonals(Wave):
    """Equation (2), operation by operation, from zero at the loss; ``gauss_newton``: HesScaleGN."""

    gauss_newton: bool = False

    def needs_gradient(self, op: Operation) -> bool:
        return bends(op)

    def step(self, op: Operation, g: Waves, wave: Waves) -> Waves:
        without = self.gauss_newton and any(h is not None for h in wave)  # from below the loss
        return pass_diagonal(op, None if without else g, wave)


@dataclass(frozen=True)
class Residual(Wave):
    """What HesScale has and HesScaleGN has not: (2) from zero below the topmost nonlinear operation under the loss.

    HesScale is linear in the curvature that it starts with and the gradients together, so this is their difference.
    """

    def needs_gradient(self, op: Operation) -> bool:
        return bends(op)

    def step(self, op: Operation, g: Waves, wave: Sequence[Any]) -> Sequence[Any]:
        reached = any(h is not None for h in wave)
        loss = starts(op, reached)  # then the second term belongs to the loss's Hessian
        given = g if loss is not reached else [None] * len(g)
        passed = pass_diagonal(op, given, [None if h is ZERO else h for h in wave])
        passed = [*passed, *[None] * (len(op.edges) - len(passed))]
        if not reached:
            below = [need and is_layer(op) for need in op.needs]
            return [ZERO if h is not None or zero else None for h, zero in zip(passed, below, strict=True)]
        return [ZERO if h is None and need else h for h, need in zip(passed, op.needs, strict=True)]

    def seeds(self, output: Output) -> dict[Edge, Any]:
        return {(op.node, 0): ZERO for op in output.marks}

    def add(self, a: Any, b: Any) -> Any:
        return b if a is ZERO else a if b is ZERO else a + b

    def reduced(self, op: Operation, wave: Any, i: int) -> Any:
        return wave if wave is ZERO else op.reduced(wave, i)


@dataclass(frozen=True)
class Split:
    """A wave diag(h) + Σᵥ Sᵥ Sᵥᵀ; the columns by source."""

    columns: dict[Any, Any] | None
    h: Any = ZERO

    def diagonal(self) -> Any:
        terms = [squared(value) for value in (self.columns or {}).values()]
        terms += [] if self.h is ZERO else [self.h]
        return sum(terms[1:], start=terms[0]) if terms else ZERO


@dataclass(frozen=True)
class LastLayer(Wave):
    """HesScale whose Gauss-Newton part is exact until it has passed a layer with weights, and a diagonal from there."""

    gauss_newton: bool = False
    by_sample = True

    def needs_gradient(self, op: Operation) -> bool:
        return FACTOR.needs_gradient(op) or RESIDUAL.needs_gradient(op)

    def step(self, op: Operation, g: Waves, wave: Sequence[Any]) -> Sequence[Any]:
        below_loss = any(w is not None for w in wave)
        above = [None if w is None else w.columns for w in wave]
        columns: Sequence[Any] = [None] * len(op.edges)
        if not below_loss or any(above):
            columns = FACTOR.step(op, g, above)
        given = [None] * len(g) if self.gauss_newton and below_loss else g
        h = RESIDUAL.step(op, given, [None if w is None else w.h for w in wave])
        h = [*h, *[None] * (len(op.edges) - len(h))]
        found = [
            None if a is b is None else Split(a, ZERO if b is None else b) for a, b in zip(columns, h, strict=True)
        ]
        return [w and Split(None, w.diagonal()) for w in found] if mixes(op) else found

    def seeds(self, output: Output) -> dict[Edge, Any]:
        return {edge: Split(columns) for edge, columns in FACTOR.seeds(output).items()}

    def add(self, a: Split, b: Split) -> Split:
        return Split(FACTOR.add(a.columns or {}, b.columns or {}), RESIDUAL.add(a.h, b.h))

    def reduced(self, op: Operation, wave: Split, i: int) -> Split:
        return Split(wave.columns, RESIDUAL.reduced(op, wave.h, i))


FACTOR, RESIDUAL = Factor(), Residual()


@dataclass(frozen=True)
class HesScale(Quantity):
    """Hessian diagonal of the loss, estimated by a backward recursion that keeps only diagonals.

        h_x = (J∘J)ᵀ h_y + diag(Σₖ gₖ ∂²yₖ/∂x²)        operation by operation, from h = 0 at the loss

    The result has the parameter's shape and the loss's scaling (the reduction's 1/N is in it, as in ``p.grad``).
    Each step is exact when the curvature at its output is diagonal; softmax cross entropy is exact at the last layer.
    The only error is the off-diagonal part dropped between layers, at shared weights, and where branches meet.

    Args:
        gauss_newton: leave out the second term of everything below the loss, that is below the topmost nonlinear
            operation (HesScaleGN): a diagonal recursion for the Gauss-Newton matrix, never negative for a
            convex loss. Saved as ``hesscale_gn``.
        ggn: what part of the Gauss-Newton matrix is carried as columns, with nothing dropped:

            * ``None``: none.
            * ``"last_layer"``: from the loss through the first layer whose weights are trained: h below it is
              Σᵥ (Jᵀ Sᵥ)² for the columns S of the loss's Hessian, for softmax p
              φ'² [(W∘W)ᵀ p - (Wᵀp)²] + φ'' g. Exact for one hidden layer and any convex loss. Costs as many columns
              in the last layer as a sample has outputs. For a loss over rows of positions, give ``samples=``: if rows
              count as samples, h is a diagonal from where they meet.
            * ``"exact"``: all of it, as in :class:`DiagGGNExact`; only the rest, HesScale - HesScaleGN, is estimated.
              Exact for up to two smooth hidden layers, or one convolution and a linear layer, with any convex loss.
            * ``"mc"``: the same from ``mc_samples`` random columns (:class:`DiagGGNMC`); its expectation is the above.
        mc_samples: random columns, for ``"mc"``.

    Raises:
        ValueError: for another ``ggn``, or one that leaves nothing to estimate (``DiagGGNExact``, ``DiagGGNMC``).
        CurvatureError: with ``ggn``, in ``backward()``, if the loss is not convex in the model's output, or if
            samples depend on each other.

    Source: Elsayed & Mahmood 2022, https://arxiv.org/abs/2210.11639; Elsayed et al. 2024,
    https://arxiv.org/abs/2406.03276; ``ggn`` is ours.
    """

    gauss_newton: bool = False
    ggn: str | None = None
    mc_samples: int = 1

    def __post_init__(self) -> None:
        positive(self, mc_samples=self.mc_samples)
        if self.ggn not in KINDS:
            raise ValueError(f"HesScale: ggn must be one of {KINDS}, got {self}")
        if self.gauss_newton and self.ggn in ("exact", "mc"):
            raise ValueError(f"HesScale: the Gauss-Newton diagonal alone is DiagGGNExact() or DiagGGNMC(), got {self}")

    @property
    def savefield(self) -> str:  # type: ignore[override]
        return "hesscale_gn" if self.gauss_newton else "hesscale"

    @property
    def waves(self) -> tuple[Wave, ...]:
        if self.ggn is None:
            return (Diagonals(self.gauss_newton),)
        if self.ggn == "last_layer":
            return (LastLayer(self.gauss_newton),)
        return FACTOR if self.ggn == "exact" else Factor("draws", self.mc_samples), RESIDUAL

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def read(self, target: Target, *arrived: Any) -> Tensor | None:
        if self.ggn is None:
            return arrived[0]  # type: ignore[no-any-return]
        wave = arrived[0] if self.ggn == "last_layer" else Split(arrived[0], ZERO if arrived[1] is None else arrived[1])
        h = None if wave is None else wave.diagonal()
        return None if h is ZERO else h


@dataclass(frozen=True)
class BL89(Carried):
    """The diagonal recursion of Becker & LeCun (1989): softmax counts as an elementwise function.

    The same recursion as :class:`HesScale` except at softmax and log-softmax, where only the true class keeps
    curvature: ``h_i = 1[i = y] q_i (1 - q_i)`` against HesScale's ``q_i - q_i²``. Shape and scaling as for HesScale.

    Source: Becker & LeCun, Improving the convergence of back-propagation learning with second order methods, 1989.
    """

    savefield = "bl89"

    def needs_gradient(self, op: Operation) -> bool:
        return bends(op)

    def step(self, op: Operation, g: Waves, wave: Waves) -> Waves:
        return pass_diagonal(op, g, wave, "bl89")
