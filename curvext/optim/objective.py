"""The function of a step that optimizers make smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..operators.data import twice_differentiable
from ..operators.space import Space
from ..solvers import FullStep, Step
from .checked import parts
from .point import BACKWARD, Point
from .search import Found, LineSearch, Trials

if TYPE_CHECKING:
    from .base import ClosureOptimizer

Closure = Callable[[], Any]


class Objective:
    """The function of a flat step d ``[P]`` that an optimizer makes smaller: f(θ + d), θ the parameters at the start.

    Attributes:
        parameters: those that require a gradient, over all groups.
        space: their shapes.
        domain: the same by the names that the optimizer was given; ``None`` without.
        evaluations: of the closure, so far.
    """

    def __init__(self, optimizer: ClosureOptimizer, closure: Closure, curvature_closure: Closure | None = None):
        self.closure, self.curvature_closure, self.second_order = closure, curvature_closure, optimizer.second_order
        rows = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not rows:
            raise CurvatureError(f"{type(optimizer).__name__}: no parameter requires a gradient")
        self.parameters: list[Tensor] = [p for p, _ in rows]
        if len({(p.dtype, p.device) for p in self.parameters}) > 1 or any(p.is_complex() for p in self.parameters):
            raise CurvatureError(f"{type(optimizer).__name__}: parameters must be real, of one dtype and on one device")
        if len({bool(group["maximize"]) for _, group in rows}) > 1:
            raise ValueError(f"{type(optimizer).__name__}: maximize must be the same in all groups")
        self.space = Space.of({str(i): p for i, p in enumerate(self.parameters)})
        self.domain = self._domain(optimizer.param_groups)
        self.sign = -1.0 if rows[0][1]["maximize"] else 1.0
        self.decay, self.lr = self._spread(rows, "weight_decay"), self._spread(rows, "lr")
        self.start = self.flat(self.parameters)
        self.loss: Any = None
        self.evaluations = 0

    @staticmethod
    def _spread(rows: Sequence[tuple[Tensor, dict[str, Any]]], name: str) -> Any:
        """A setting of the groups: one number if it is the same for all, else one for each entry ``[P]``."""
        if len({float(group[name]) for _, group in rows}) == 1:
            return float(rows[0][1][name])
        return torch.cat([torch.full((p.numel(),), float(g[name]), dtype=p.dtype, device=p.device) for p, g in rows])

    @staticmethod
    def _domain(groups: Sequence[dict[str, Any]]) -> Space | None:
        if "param_names" not in groups[0]:
            return None
        pairs = [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]
        return Space.of({name: p for name, p in pairs if p.requires_grad})

    def decayed(self, v: Tensor) -> Tensor:
        """Weight decay times columns ``[P, K]``."""
        return self.decay * v if isinstance(self.decay, float) else self.decay.unsqueeze(1) * v

    @staticmethod
    def flat(tensors: Sequence[Tensor]) -> Tensor:
        """One vector of all entries."""
        return torch.cat([t.detach().flatten() for t in tensors])

    def split(self, v: Tensor) -> list[Tensor]:
        """A flat vector, or rows ``[..., P]``, in the parameters' shapes."""
        pieces = v.split([p.numel() for p in self.parameters], -1)
        return [piece.reshape(v.shape[:-1] + p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def move(self, d: Tensor | None) -> None:
        """Set the parameters to θ + d; ``None``: back to θ exactly."""
        for p, v in zip(self.parameters, self.split(self.start if d is None else self.start + d), strict=True):
            p.copy_(v)

    def penalty(self) -> Any:
        """½ Σ weight_decay ‖p‖² where the parameters are now."""
        if isinstance(self.decay, float) and not self.decay:
            return 0.0
        theta = self.flat(self.parameters)
        return 0.5 * (self.decay * theta).dot(theta)

    def call(self, closure: Closure, twice: bool = True) -> tuple[Tensor, list[Tensor]]:
        """A closure's loss and outputs. Always with gradients: a loss may need derivatives for its value.

        ``twice``: by kernels that can be differentiated twice, if the optimizer needs that; at every evaluation, so
        that values are the same to the last bit.
        """
        self.evaluations += 1
        with torch.enable_grad(), twice_differentiable(None) if twice and self.second_order else nullcontext():
            found = closure()
            loss, outputs = parts(found)
            outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not all(isinstance(z, Tensor) for z in outputs):
                raise CurvatureError(
                    f"the closure must return a scalar loss, or (loss, outputs), outputs one tensor or a list; got "
                    f"{type(found).__name__}"
                )
            return loss.reshape(()), outputs

    def value(self, d: Tensor | None = None) -> Tensor:
        """f(θ + d); the parameters stay there."""
        self.move(d)
        return self.sign * self.call(self.closure)[0].detach() + self.penalty()

    def check(self) -> None:
        """Raise if two evaluations at one place differ, or if one leaves gradients."""
        before = [(p.grad, p.grad is not None and p.grad._version) for p in self.parameters]
        for closure in filter(None, (self.closure, self.curvature_closure)):
            a, b = (self.call(closure)[0].detach() for _ in range(2))
            if not torch.equal(a, b) and not bool((a - b).abs() <= torch.finfo(a.dtype).eps ** (2 / 3) * a.abs()):
                raise CurvatureError(
                    f"the closure is not deterministic: {a.item():.8g} and {b.item():.8g} at the same parameters. Use "
                    "one batch for all evaluations of a step, and model.eval() or no dropout"
                )
        if any(p.grad is not g or (g is not None and g._version != v)
               for p, (g, v) in zip(self.parameters, before, strict=True)):  # fmt: skip
            raise CurvatureError(BACKWARD)

    def point(self, d: Tensor | None = None, products: bool | str = True) -> Point:
        """f, its gradient and its curvature at θ + d; the parameters stay there.

        Once parameters have moved, products with the curvature of an earlier point raise; its gradient is still there
        if it has been asked for. ``products=False`` is for a gradient alone: no graph is kept.
        ``"gauss_newton"``: the loss's graph, and not the gradient's.
        """
        self.move(d)
        point = Point(self, self.closure, products)
        if self.loss is None:
            self.loss = point.graph.term.value.detach()
        return point

    def curved(self, point: Point) -> Point:
        """The point whose curvature is to be used: of the second closure where there is one, else the same."""
        return point if self.curvature_closure is None else Point(self, self.curvature_closure)

    def search(
        self, point: Point, line_search: LineSearch | None, directions: Mapping[str, Tensor], points: bool = False
    ) -> Found:
        """Go along the first of some directions, times ``lr``, that descends and on which the search finds a step.

        Args:
            point: at θ.
            line_search: ``None`` for full steps.
            directions: ``[P]``, by a name for the report.
            points: whether the gradient where the search ends will be needed; keeps the graph of the last trial.
        """
        failed = []
        for name, p in directions.items():
            d = self.lr * p
            slope = float(point.gradient.dot(d))
            if not slope < 0:
                failed.append(f"{name}: does not descend")
                continue
            trials = Trials(self, d, getattr(line_search, "slopes", False), points)
            step = (line_search or FullStep())(trials, float(point.value), slope)
            if step.size:
                if trials.size != step.size:
                    self.move(step.size * d)
                how = "" if step.accepted else ", line search not finished"
                return Found(name, step, step.size * d, "; ".join([*failed, name + how]), trials.at(step.size))
            failed.append(f"{name}: nothing lower in {step.evaluations} evaluations")
        return self.stay(point, "; ".join(failed) if bool(point.gradient.any()) else "the gradient is zero")

    def stay(self, point: Point, reason: str) -> Found:
        """No step; the parameters are what they were."""
        self.move(None)
        return Found(None, Step(0.0, float(point.value), 0, False), torch.zeros_like(self.start), reason)
