"""Saddle-free Newton: Newton's method with the absolute value of the Hessian."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..linalg import eigh
from ..solvers import Armijo, LevenbergMarquardt, lanczos, saddle_free, saddle_free_series
from .base import ClosureOptimizer, Damping
from .batches import Subsample
from .objective import Objective
from .point import Point, Products
from .search import Found, LineSearch, Report

DAMPING = {
    "lanczos": LevenbergMarquardt(first=1e-2, boost=3.0, drop=1 / 3, least=1e-8),
    "series": LevenbergMarquardt(first=1.0, boost=1 / 0.9, drop=0.9, least=1e-8, guard=False),
}


class SaddleFreeNewton(ClosureOptimizer):
    """θ ← θ - α lr u,  u = (|H| + λ I)⁻¹ ∇f,  |H| = (H²)^½: down along negative curvature as along positive.

        optimizer = SaddleFreeNewton(model.parameters())
        loss = optimizer.step(lambda: loss_fn(model(x), y))

    ``method="lanczos"`` takes u from the Krylov space of ∇f, with ``products`` products; ``method="series"`` sums
    ``terms`` terms of the series of Oldewage and others with 2 (``terms`` - 1) products, accelerated by Shanks's
    transformation, with their rule for the scale V. The first is far more accurate for the same products.

    λ follows Levenberg and Marquardt; the ratio's model is gᵀd + ½ dᵀHd for Lanczos, which costs no product, and
    gᵀd + ½ dᵀ(|H| + λ)d for the series, as in the paper.

    ``momentum="adaptive"`` adds the step before, δ: the step is the saddle-free one on the span of u and δ, for two
    products more. (The paper's own rule for the two factors takes |H| u + λ u for ∇f, which makes them 1 and 0 always.)

    Where ‖∇f‖ <= ``stationary``, a Lanczos run from a random vector looks for negative curvature, and the step goes
    along it if there is any: this leaves saddles even where the gradient is exactly zero.

    Args:
        params, lr, weight_decay, maximize, curvature_batch: see :class:`~curvext.optim.base.ClosureOptimizer`.
        method: ``"lanczos"`` or ``"series"``.
        products: of a Lanczos run, which keeps as many vectors; ``two_passes`` keeps four, for twice the products.
        terms, order, scale, scale_decay: of the series: K, the order of Shanks's transformation, the first V, and by
            which factor V shrinks a step (1 in the paper; 0.95 lets one early spike be forgotten).
        damping: a rule for λ. By default λ starts at 1e-2 and changes by 3 with Lanczos; as in the paper, at 1 and by
            1 / 0.9, with the series.
        momentum: a factor of the step before, or ``"adaptive"``.
        stationary: see above; negative: never.
        line_search: ``Armijo()``, ``StrongWolfe()``; ``None`` for α = 1 if that is lower, else no step;
            ``FullStep(always=True)`` as in the paper.

    Sources: Dauphin et al. 2014, https://arxiv.org/abs/1406.2572; Oldewage, Clarke & Hernández-Lobato 2023,
    https://arxiv.org/abs/2310.14901.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        method: str = "lanczos",
        products: int = 20,
        two_passes: bool = False,
        terms: int = 20,
        order: int = 1,
        scale: float = 100.0,
        scale_decay: float = 1.0,
        damping: Damping | None = None,
        momentum: float | str = 0.0,
        stationary: float = 1e-6,
        line_search: LineSearch | None = Armijo(),  # noqa: B008
        weight_decay: float = 0.0,
        maximize: bool = False,
        curvature_batch: Subsample | None = None,
    ):
        if method not in DAMPING or not (momentum == "adaptive" or (not isinstance(momentum, str) and momentum >= 0)):
            raise ValueError(f"SaddleFreeNewton: method={method!r}, momentum={momentum!r}: 'lanczos' or 'series', and "
                             "a number >= 0 or 'adaptive'")  # fmt: skip
        if products < 1 or not 0 < scale_decay <= 1 or scale <= 0:
            raise ValueError(f"SaddleFreeNewton: products={products} >= 1, 0 < scale_decay={scale_decay} <= 1 and "
                             f"scale={scale} > 0 are needed")  # fmt: skip
        if order < 0 or terms < 2 * order + 1:
            raise ValueError(f"SaddleFreeNewton: order={order} >= 0 and terms={terms} > 2 order are needed")
        if two_passes and (method != "lanczos" or momentum == "adaptive"):
            raise ValueError("SaddleFreeNewton: two_passes is for method='lanczos', without momentum='adaptive'")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}, curvature_batch)
        self.method, self.products, self.two_passes, self.terms, self.order = method, products, two_passes, terms, order
        self.scale, self.scale_decay, self.momentum, self.stationary = scale, scale_decay, momentum, stationary
        self.damping, self.line_search = damping or DAMPING[method], line_search

    def _step(self, objective: Objective) -> Report:
        point = objective.point(products=objective.curvature_closure is None)
        curved, g = objective.curved(point), point.gradient
        H, λ = curved.curvature(), self._strength
        size = float(torch.linalg.vector_norm(g))
        escaped = self._escape(objective, point, H) if size <= self.stationary else None
        if escaped is not None or not size:
            found = escaped or objective.stay(point, "the gradient is zero")
            return found.report(point, curved.products)
        p, κ = self._direction(H, g, λ, self.recall("before", objective) if self.momentum else None)
        d = objective.lr * p
        κ = objective.lr**2 * κ if κ is not None and isinstance(objective.lr, float) else float(d.dot(H @ d))
        directions = {"saddle-free": p, "steepest descent": -g}
        found = objective.search(point, self.line_search, directions)
        ratio = found.ratio(point, float(g.dot(d)), κ) if found.name == "saddle-free" else -math.inf
        self.carried["damping"] = self.damping(λ, ratio, step=found.step.size)
        if self.momentum and found.name:
            self.remember("before", found.step.size * directions[found.name], objective)
        return found.report(point, curved.products, damping=λ, ratio=ratio)

    def _direction(self, H: Products, g: Tensor, λ: float, before: Tensor | None) -> tuple[Tensor, float | None]:
        """The step for ``lr`` 1, and its curvature in the model of the damping rule, where known."""
        p, κ = self._lanczos(H, g, λ, before) if self.method == "lanczos" else self._series(H, g, λ, before)
        if before is None or isinstance(self.momentum, str):
            return p, κ
        return p + self.momentum * before, None

    def _lanczos(self, H: Products, g: Tensor, λ: float, before: Tensor | None) -> tuple[Tensor, float]:
        solution = saddle_free(H, g, damping=λ, steps=self.products, two_passes=self.two_passes)
        krylov = solution.krylov
        assert krylov is not None
        adaptive = before is not None and self.momentum == "adaptive"
        more = _beside(krylov.basis, before) if adaptive else None  # type: ignore[arg-type]
        if more is None or krylov.basis is None:
            return -solution.x, krylov.quadratic(lambda t: t / (t.abs() + λ) ** 2)
        Q = torch.cat([krylov.basis, more[:, None]], 1)
        T = torch.zeros(Q.shape[1], Q.shape[1], dtype=torch.float64)
        T[:-1, :-1] = krylov.alpha.diag() + krylov.beta[:-1].diag(1) + krylov.beta[:-1].diag(-1)
        T[-1] = T[:, -1] = (Q.mT @ (H @ more)).to(T)
        values, vectors = eigh(T)
        c = -krylov.length * vectors @ (vectors[0] / (values.abs() + λ))
        return Q @ c.to(Q), float(c @ T @ c)

    def _series(self, H: Products, g: Tensor, λ: float, before: Tensor | None) -> tuple[Tensor, float]:
        scale = self.carried.get("scale", self.scale)
        options: dict[str, Any] = {"terms": self.terms, "order": self.order, "decay": self.scale_decay}
        solution = saddle_free_series(H, g, damping=λ, scale=scale, **options)
        self.carried["scale"] = solution.scale
        if before is None or self.momentum != "adaptive":
            return -solution.x, float(solution.x.dot(g))
        return _on_span(H, torch.stack([solution.x, before], 1), g, λ)

    def _escape(self, objective: Objective, point: Point, H: Products) -> Found | None:
        """A step along negative curvature, f(θ + √t v) <= f(θ) + c t ½ vᵀHv; ``None`` if a normal step is next."""
        seed = self.carried["escapes"] = self.carried.get("escapes", 0) + 1
        start = torch.randn(len(point.theta), generator=torch.Generator().manual_seed(seed)).to(point.theta)
        krylov = lanczos(H, start, steps=self.products)
        if float(krylov.values[0]) >= -math.sqrt(torch.finfo(start.dtype).eps) * float(krylov.values.abs().max()):
            reason = f"the gradient is zero, and {krylov.products} products have met no negative curvature"
            return None if bool(point.gradient.any()) else objective.stay(point, reason)
        v = krylov.vectors(slice(0, 1)).squeeze(1)
        v = objective.lr * torch.where(point.gradient.dot(v) > 0, -v, v)
        slope = float(v.dot(H @ v)) / 2
        if not slope < 0:
            return objective.stay(point, "lr takes the step off the negative curvature")
        step = Armijo()(lambda t: float(objective.value(math.sqrt(t) * v)), float(point.value), slope)
        if not step.size:
            return objective.stay(point, f"negative curvature: nothing lower in {step.evaluations} evaluations")
        size = math.sqrt(step.size)
        return Found("negative curvature", replace(step, size=size), size * v, "negative curvature, near stationary")


def _beside(Q: Tensor, v: Tensor) -> Tensor | None:
    """The unit vector that v adds to orthonormal columns; ``None`` if it adds nothing."""
    length = torch.linalg.vector_norm(v)
    for _ in range(2):
        v = v - Q @ (Q.mT @ v)
    left = torch.linalg.vector_norm(v)
    return v / left if bool(left > 1e-3 * length) else None


def _on_span(H: Products, B: Tensor, g: Tensor, λ: float) -> tuple[Tensor, float]:
    """The step -Q (M + λ I)⁻¹ Qᵀg, Q an orthonormal basis of some columns and M = (QᵀH²Q)^½, and its model's curvature.

    M needs the products HQ alone, and is never below Qᵀ|H|Q: the step is never too long for its model. (|QᵀHQ| is
    too small where a column mixes curvature of both signs.)
    """
    Q, _ = torch.linalg.qr(B)
    values, vectors = eigh((HQ := H @ Q).mT @ HQ)
    shifted = values.clamp(min=0).sqrt() + λ
    c = vectors.mT @ (Q.mT @ g) / shifted
    return -Q @ (vectors @ c), float((c**2 * shifted).sum())
