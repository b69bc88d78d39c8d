"""Martens's Hessian-free optimization, and its block-diagonal form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..solvers import Armijo, LevenbergMarquardt, Martens, Solution, backtrack, cg, reduction_ratio
from .base import Damping
from .batches import Subsample
from .krylov import KrylovOptimizer
from .lagged import Lagged
from .objective import Objective
from .point import Point, Products
from .precondition import Preconditioner, by_name
from .search import LineSearch, Report


class HessianFree(KrylovOptimizer):
    """θ ← θ + α lr s, with s on the way of conjugate gradients to (G + λ I) s = -∇f.

        optimizer = HessianFree(model.parameters(), preconditioner="fisher")
        loss = optimizer.step(closure)  # returns (loss, outputs)

    CG starts at ``decay`` times where it ended the step before, x₀, and ends where its model m gains little
    (:class:`~curvext.solvers.Martens`). Of the iterates ⌈1.3ʲ⌉ - 1 and the last one, x, the step is the latest that is
    lower than the one before it, and then shortened by Armijo's rule, α = 1, 0.8, 0.64, ... λ follows Levenberg and
    Marquardt with ρ = (f(θ + x) - f(θ)) / m(x), damping included in m. Both look at full steps, ``lr`` = 1: it scales
    what comes out.

    Args:
        params, lr, weight_decay, maximize, curvature_batch: see :class:`~curvext.optim.base.ClosureOptimizer`.
        curvature: ``"gauss_newton"``, for closures that return ``(loss, outputs)``; or ``"hessian"``.
        steps: of CG, at most; one product each, and one more for x₀.
        stop: ``Martens()`` with the window's factor; ``Martens(strict=True)`` as PyTorchHessianFree does.
        tolerance: CG also ends with ‖(G + λ I) x + ∇f‖ <= ``tolerance`` ‖∇f‖.
        decay: of x₀; zero for none.
        negative: at negative curvature ``"stop"``, or go on with its ``"absolute"`` value.
        backtracking: whether to go back through the iterates.
        damping: a rule for λ. By default λ starts at 1, falls to ⅔ where ρ > ¾ and rises to 1½ where ρ < ¼.
        warm_ratio: ρ = (f(θ + x) - f(θ + x₀)) / (m(x) - m(x₀)) instead, as in PyTorchHessianFree. Where f falls more
            along x₀ than m does, that is negative however good x is, and λ winds up.
        preconditioner: a name ("fisher" as in the source, "hesscale", ...) or an object of
            :mod:`curvext.optim.precondition`.
        blocks: solve for parts of the parameters on their own, each with its own block of the matrix (Zhang et al.):
            every ``"group"``, or every ``"layer"`` of ``model.named_parameters()``. A product a block and step.
        line_search: for α; ``None`` for α = 1 if that is lower, else no step.

    Sources: Martens 2010, Deep learning via Hessian-free optimization; Zhang et al. 2017, Block-diagonal Hessian-free
    optimization for training neural networks, https://arxiv.org/abs/1712.07296.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        curvature: str = "gauss_newton",
        steps: int = 250,
        stop: Martens | None = Martens(),  # noqa: B008
        tolerance: float = 1e-5,
        decay: float = 0.95,
        negative: str = "stop",
        backtracking: bool = True,
        damping: Damping = LevenbergMarquardt(guard=False),  # noqa: B008
        warm_ratio: bool = False,
        preconditioner: str | Preconditioner | Lagged | None = None,
        blocks: str | None = None,
        line_search: LineSearch | None = Armijo(c=1e-2, shrink=0.8, trials=20),  # noqa: B008
        weight_decay: float = 0.0,
        maximize: bool = False,
        curvature_batch: Subsample | None = None,
    ):
        if curvature not in ("hessian", "gauss_newton") or negative not in ("stop", "absolute"):
            raise ValueError(f"HessianFree: curvature={curvature!r}, negative={negative!r}: 'hessian' or "
                             "'gauss_newton', and 'stop' or 'absolute'")  # fmt: skip
        if blocks not in (None, "group", "layer") or (blocks and preconditioner is not None):
            raise ValueError(f"HessianFree: blocks={blocks!r}: 'group' or 'layer', without a preconditioner, or None")
        if steps < 1 or not 0 <= tolerance < 1 or not 0 <= decay <= 1:
            raise ValueError(f"HessianFree: steps={steps} >= 1, 0 <= tolerance={tolerance} < 1 and "
                             f"0 <= decay={decay} <= 1 are needed")  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}, curvature_batch)
        self.curvature, self.steps, self.stop, self.tolerance = curvature, steps, stop, tolerance
        self.decay, self.negative, self.backtracking, self.blocks = decay, negative, backtracking, blocks
        self.damping, self.warm_ratio, self.line_search = damping, warm_ratio, line_search
        self.preconditioner = by_name(preconditioner)

    def _step(self, objective: Objective) -> Report:
        point = objective.point(products=objective.curvature_closure is None and self.curvature)
        curved, g = objective.curved(point), point.gradient
        if not bool(g.any()):
            return objective.stay(point, "the gradient is zero").report(point)
        λ = self._strength
        before = self.recall("solution", objective) if self.decay else None
        x0 = None if before is None else self.decay * before
        solution, said = self._solve(curved, objective, g, λ, x0)
        self.remember("solution", solution.x, objective)
        s, value = solution.x, float(objective.value(solution.x))
        ratio = self._ratio(objective, point, solution, value, x0 if self.warm_ratio else None)
        if self.backtracking and len(solution.iterates) > 1:
            s, _, _ = backtrack(_once(objective, solution.x, value), _nonzero(solution.iterates))
        found = objective.search(point, self.line_search, {f"CG ({solution.reason})": s, "steepest descent": -g})
        self.carried["damping"] = self.damping(λ, ratio)
        details = {"damping": λ, "ratio": ratio, "solver": solution.reason, **said}
        return found.report(point, curved.products, **details)

    def _solve(
        self, curved: Point, objective: Objective, g: Tensor, λ: float, x0: Tensor | None
    ) -> tuple[Solution, dict[str, Any]]:
        A = curved.curvature(self.curvature)
        options = {"tolerance": self.tolerance, "stop": self.stop, "steps": self.steps, "negative": self.negative,
                   "store": 1.3}  # fmt: skip
        solver = cg if not self.blocks else partial(_blockwise, parts=self._parts(objective))
        return self._solved(solver, A, -g, curved, λ, x0=x0, **options)

    @staticmethod
    def _ratio(objective: Objective, point: Point, solution: Solution, value: float, x0: Tensor | None) -> float:
        """ρ, from x0 (``None``: from zero) to where CG ended."""
        assert solution.values is not None
        if x0 is None:
            return reduction_ratio(value - float(point.value), float(solution.values[-1]))
        return reduction_ratio(value - float(objective.value(x0)), float(solution.values[-1] - solution.values[0]))

    def _parts(self, objective: Objective) -> list[Tensor]:
        """For every block, the places of its entries in ``[P]``."""
        keys = [key for i, group in enumerate(self.param_groups) for key in self._keys(i, group)]
        sizes = [p.numel() for p in objective.parameters]
        places = torch.arange(sum(sizes), device=objective.start.device).split(sizes)
        found: dict[Any, list[Tensor]] = {}
        for key, place in zip(keys, places, strict=True):
            found.setdefault(key, []).append(place)
        return [torch.cat(places) for places in found.values()]

    def _keys(self, i: int, group: dict[str, Any]) -> list[Any]:
        """The block of every parameter of a group that is trained."""
        trained = [k for k, p in enumerate(group["params"]) if p.requires_grad]
        if self.blocks == "group":
            return [i] * len(trained)
        if "param_names" not in group:
            raise ValueError("HessianFree: blocks='layer' needs names: HessianFree(model.named_parameters(), ...)")
        return [group["param_names"][k].rpartition(".")[0] for k in trained]


@dataclass(frozen=True)
class _Block:
    """A diagonal block of a matrix, by products with the whole."""

    whole: Products
    places: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.places), len(self.places)

    def __matmul__(self, v: Tensor) -> Tensor:
        full = v.new_zeros(self.whole.shape[0])
        full[self.places] = v
        return (self.whole @ full)[self.places]


def _blockwise(A: Products, b: Tensor, x0: Tensor | None, parts: Sequence[Tensor], **options: Any) -> Solution:
    """CG on every diagonal block, put together; iterates where all of them have one or have ended."""
    solved = [cg(_Block(A, at), b[at], x0=None if x0 is None else x0[at], **options) for at in parts]

    def whole(pieces: Sequence[Tensor]) -> Tensor:
        x = torch.empty_like(b)
        for at, piece in zip(parts, pieces, strict=True):
            x[at] = piece
        return x

    steps = sorted({step for one in solved for step in one.iterates})
    iterates = {k: whole([one.iterates[max(j for j in one.iterates if j <= k)] for one in solved]) for k in steps}
    longest = max(solved, key=lambda one: one.steps)
    ends = [torch.stack([one.values[k] for one in solved]).sum() for k in (0, -1)]  # type: ignore[index]
    return replace(longest, x=whole([one.x for one in solved]), values=torch.stack(ends), iterates=iterates,
                   products=sum(one.products for one in solved))  # fmt: skip


def _nonzero(iterates: dict[int, Tensor]) -> dict[int, Tensor]:
    """Without a start at zero, which is no step."""
    return {step: x for step, x in iterates.items() if step or bool(x.any())}


def _once(objective: Objective, known: Tensor, value: float) -> Any:
    """f, with one value that is known."""
    return lambda x: value if x is known else float(objective.value(x))
