"""Preconditioned conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from .solution import Solution, check, damped, dot, norm, preconditioned, where

REASONS = ("steps", "tolerance", "progress", "negative curvature", "not finite", "preconditioner not positive definite")
RUNNING, TOLERANCE, PROGRESS, NEGATIVE, NOT_FINITE, PRECONDITIONER = range(6)


@dataclass(frozen=True)
class Martens:
    """Stop where the quadratic model φ gains little: after step i > k = max(``window``, ⌈i / 10⌉), if

        φᵢ < 0  and  (φᵢ - φᵢ₋ₖ) / φᵢ < k ε.

    J. Martens, Deep learning via Hessian-free optimization, 2010, section 4.4.

    Args:
        epsilon: ε, the relative gain of one step.
        window: the smallest k.
        strict: measure against φᵢ - φ₀, the gain since ``x0``, and without the factor k, as PyTorchHessianFree does:
            at least ``window`` times stricter.
    """

    epsilon: float = 5e-4
    window: int = 10
    strict: bool = False

    def met(self, values: list[Tensor]) -> Tensor:
        """Whether to stop after the last of ``values``, column by column."""
        step, last = len(values) - 1, values[-1]
        k = max(self.window, math.ceil(step / 10))
        if step <= k:
            return torch.zeros_like(last, dtype=torch.bool)
        gain = last - values[0] if self.strict else last
        return (gain < 0) & (last - values[-1 - k] > self.epsilon * (1 if self.strict else k) * gain)


def cg(
    operator: Any,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    damping: float = 0.0,
    preconditioner: Any = None,
    tolerance: float = 1e-5,
    stop: Martens | None = None,
    steps: int | None = None,
    negative: str = "stop",
    store: float | None = None,
) -> Solution:
    """(A + δ I) x = b for a symmetric positive (semi-)definite operator; or as far as that holds.

    One product a step. Columns ``[P, K]`` are solved side by side, each with its own step sizes and its own end.

    Args:
        operator: A, anything with ``.shape`` and ``@``.
        b: ``[P]`` or ``[P, K]``.
        x0: where to start, for one more product; zero if not given.
        damping: δ.
        preconditioner: M near (A + δ I)⁻¹, symmetric positive definite: an operator, a matrix, or a diagonal ``[P]``.
        tolerance: ends with ‖b - (A + δ I) x‖ <= tolerance ‖b‖; zero to leave the end to ``stop`` and ``steps``.
        stop: :class:`Martens`, to end by the gain of the quadratic model as well.
        steps: at most; P if not given.
        negative: what to do where pᵀ(A + δ I)p <= 0 (to rounding): ``"stop"`` there, x being the last iterate (zero if
            it is the first step: then take ``direction``), or go on with ``"absolute"`` value.
        store: keep the iterates ⌈storeʲ⌉ - 1, j = 0, 1, ...; Martens uses 1.3.

    Returns:
        ``converged`` by ``tolerance`` or ``stop``; ``values``, ``direction``, ``curvature`` and ``iterates`` are
        filled.

    Sources: Nocedal and Wright, Numerical Optimization, algorithms 5.3 and 7.1; Martens 2010.
    """
    b = check(operator, b, columns=True)
    if negative not in ("stop", "absolute"):
        raise CurvatureError(f"negative={negative!r}: give 'stop' or 'absolute'")
    product, precondition = damped(operator, damping), preconditioned(preconditioner, b)
    x = torch.zeros_like(b) if x0 is None else x0.detach().to(b).clone()
    r = b if x0 is None else b - product(x)
    run = _Run(b, x, r, precondition(r), tolerance * norm(b), negative == "absolute")
    step, limit, iterates = 0, len(b) if steps is None else steps, {0: x}
    while step < limit and bool((run.code == RUNNING).any()):
        step += 1
        Ap = product(run.p)
        run.advance(run.measure(Ap), Ap, precondition)
        if stop is not None:
            run.end(PROGRESS, stop.met(run.values))
        if store and step in _grid(store, step):
            iterates[step] = run.x
    columns = b.shape[1] if b.dim() == 2 else 1
    return run.solution((step + (x0 is not None)) * columns, iterates | {step: run.x} if store else {})


def _grid(factor: float, upto: int) -> set[int]:
    """⌈factorʲ⌉ - 1, j = 0, 1, ..., as far as ``upto``."""
    return {math.ceil(factor**j) - 1 for j in range(2 + math.ceil(math.log(upto + 1, factor)))}


class _Run:
    """CG in flight; every number is one a column."""

    def __init__(self, b: Tensor, x: Tensor, r: Tensor, y: Tensor, goal: Tensor, absolute: bool):
        self.b, self.x, self.r, self.p = b, x, r, y
        self.ry, self.goal, self.absolute = dot(r, y), goal, absolute
        self.scale, self.direction = torch.zeros_like(goal), torch.zeros_like(b)
        self.curvature = torch.full_like(goal, math.inf)
        self.residuals, self.values = [norm(r)], [-dot(x, b + r) / 2]
        self.code = torch.zeros_like(goal, dtype=torch.long)
        self.end(TOLERANCE, self.residuals[0] <= goal)
        self.end(PRECONDITIONER, self.ry < 0)

    def end(self, code: int, at: Tensor) -> None:
        """Columns that are still running and meet a condition, stop."""
        self.code = torch.where((self.code == RUNNING) & at, code, self.code)

    def measure(self, Ap: Tensor) -> Tensor:
        """pᵀAp, and what follows where it is not positive."""
        κ, pp = dot(self.p, Ap), dot(self.p, self.p)
        self.scale = torch.maximum(self.scale, κ.abs() / pp)
        flat = (self.code == RUNNING) & (κ <= torch.finfo(κ.dtype).eps * self.scale * pp)
        lower = flat & (κ / pp < self.curvature)
        self.direction = torch.where(lower, self.p, self.direction)
        self.curvature = torch.where(lower, κ / pp, self.curvature)
        self.end(NOT_FINITE, ~κ.isfinite())
        if not self.absolute:
            self.end(NEGATIVE, flat)
        return κ.abs()

    def advance(self, κ: Tensor, Ap: Tensor, precondition: Callable[[Tensor], Tensor]) -> None:
        """To the minimiser along p, and to the next p."""
        active = self.code == RUNNING
        α = where(active, self.ry / κ)
        self.x = self.x + α * where(active, self.p)
        self.r = self.r - α * where(active, Ap)
        y = precondition(self.r)
        ry = dot(self.r, y)
        self.p = torch.where(active, y + ry / self.ry * self.p, self.p)
        self.ry = torch.where(active, ry, self.ry)
        self.residuals.append(norm(self.r))
        self.values.append(-dot(self.x, self.b + self.r) / 2)
        self.end(TOLERANCE, self.residuals[-1] <= self.goal)
        self.end(PRECONDITIONER, ry < 0)

    def solution(self, products: int, iterates: dict[int, Tensor]) -> Solution:
        codes = self.code.reshape(-1).tolist()
        met = not bool(self.curvature.isinf().all())
        return Solution(
            x=self.x,
            residuals=torch.stack(self.residuals),
            converged=all(code in (TOLERANCE, PROGRESS) for code in codes),
            products=products,
            reason=tuple(REASONS[code] for code in codes) if self.b.dim() == 2 else REASONS[codes[0]],
            values=torch.stack(self.values),
            direction=self.direction if met else None,
            curvature=self.curvature if met else None,
            iterates=iterates,
        )
