"""What optimizers share that look at the loss several times a step: the closure, flat vectors, products, the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import CurvatureError
from ..operators.data import Term
from ..operators.linearised import Linearised

Closure = Callable[[], Any]


@dataclass(frozen=True)
class Report:
    """What a step did.

    Attributes:
        before, after: the objective, weight decay included, before and after the step.
        moved: whether the parameters changed.
        reason: why the step is what it is, in words.
        products: products with the curvature.
        evaluations: of the closure.
        details: what the optimizer adds: step size, damping, reduction ratio, ...
    """

    before: float
    after: float
    moved: bool
    reason: str
    products: int = 0
    evaluations: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)


class ClosureOptimizer(Optimizer):
    """An optimizer whose ``step(closure)`` evaluates the closure several times.

    The closure returns the loss, or ``(loss, outputs)`` where the Gauss-Newton matrix is split at the model's outputs,
    and calls no ``backward``. It must give the same loss each time it is called at the same parameters. The objective
    of a step is the loss plus ``½ weight_decay ‖p‖²`` of every group; ``maximize`` negates the loss. ``lr`` scales what
    a group's parameters are moved by. After a step, :attr:`report` says what it did.

    Subclasses give ``_step(objective)``, which moves the parameters and returns a :class:`Report`. Numbers that are
    carried from step to step belong into ``self.carried``, tensors shaped like parameters into ``self.state[p]`` (see
    :meth:`recall` and :meth:`remember`): both survive ``state_dict()``.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]):
        defaults = {"lr": 1.0, "weight_decay": 0.0, "maximize": False, **defaults}
        for name in ("lr", "weight_decay"):
            if not float(defaults[name]) >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must be >= 0, got {defaults[name]}")
        super().__init__(params, defaults)
        self.report: Report | None = None

    @property
    def carried(self) -> dict[str, Any]:
        """Numbers that belong to all groups, kept in the first."""
        return self.param_groups[0].setdefault("carried", {})  # type: ignore[no-any-return]

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """One step; returns the loss before it.

        Raises:
            CurvatureError: if there is no closure, it is not deterministic or calls ``backward``, or its loss is not
                finite.
        """
        if closure is None:
            raise CurvatureError(f"{type(self).__name__}.step needs a closure that returns the loss")
        objective = Objective(self, closure)
        if not self.carried.get("checked"):
            objective.check_deterministic()
            self.carried["checked"] = True
        self.report = self._step(objective)
        return objective.loss

    def _step(self, objective: Objective) -> Report:
        raise NotImplementedError

    def recall(self, name: str, objective: Objective) -> Tensor | None:
        """A flat vector ``[P]`` remembered under a name; ``None`` if a parameter has none."""
        found = [self.state[p].get(name) for p in objective.parameters]
        return None if any(v is None for v in found) else torch.cat([v.flatten() for v in found])

    def remember(self, name: str, value: Tensor, objective: Objective) -> None:
        """Keep a flat vector, in the parameters' states."""
        for p, piece in zip(objective.parameters, objective.split(value), strict=True):
            self.state[p][name] = piece.clone()


class Objective:
    """The function of a flat step d ``[P]`` that an optimizer makes smaller: f(θ + d), θ the parameters at the start.

    Attributes:
        parameters: those that require a gradient, over all groups.
        evaluations: of the closure, so far.
    """

    def __init__(self, optimizer: ClosureOptimizer, closure: Closure):
        self.closure = closure
        rows = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not rows:
            raise CurvatureError(f"{type(optimizer).__name__}: no parameter requires a gradient")
        self.parameters: list[Tensor] = [p for p, _ in rows]
        if len({(p.dtype, p.device) for p in self.parameters}) > 1 or any(p.is_complex() for p in self.parameters):
            raise CurvatureError(f"{type(optimizer).__name__}: parameters must be real, of one dtype and on one device")
        self.sign = -1.0 if optimizer.param_groups[0]["maximize"] else 1.0
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
    def flat(tensors: Sequence[Tensor]) -> Tensor:
        """One vector of all entries."""
        return torch.cat([t.detach().flatten() for t in tensors])

    def split(self, v: Tensor) -> list[Tensor]:
        """A flat vector in the parameters' shapes."""
        pieces = v.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

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

    def _call(self) -> tuple[Tensor, list[Tensor]]:
        """The closure's loss and outputs."""
        self.evaluations += 1
        found = self.closure()
        loss, outputs = found if isinstance(found, tuple) else (found, [])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise CurvatureError(
                f"the closure must return a scalar loss, or (loss, outputs), not {type(loss).__name__}"
            )
        if self.loss is None:
            self.loss = loss.detach()
        return loss, [outputs] if isinstance(outputs, Tensor) else list(outputs)

    def value(self, d: Tensor | None = None) -> Tensor:
        """f(θ + d); the parameters stay there."""
        self.move(d)
        loss, _ = self._call()
        return self.sign * loss.detach() + self.penalty()

    def check_deterministic(self) -> None:
        """Raise if two evaluations at one place differ."""
        a, b = self.value(), self.value()
        if not torch.equal(a, b) and not bool((a - b).abs() <= 1e-6 * a.abs()):
            raise CurvatureError(
                f"the closure is not deterministic: {a.item():.8g} and {b.item():.8g} at the same parameters. Use one "
                "batch for all evaluations of a step, and model.eval() or no dropout"
            )

    def point(self, d: Tensor | None = None) -> Point:
        """f, its gradient and its curvature at θ + d; the parameters stay there."""
        self.move(d)
        with torch.enable_grad():
            loss, outputs = self._call()
            loss = loss.reshape(())
        if not loss.requires_grad:
            raise CurvatureError("the closure's loss does not depend on the parameters through a graph")
        return Point(self, loss, outputs)


class Point:
    """The objective at one place: its value, gradient and curvature products; the graph is kept while this is."""

    def __init__(self, objective: Objective, loss: Tensor, outputs: list[Tensor]):
        self.objective = objective
        self.graph = Linearised(Term(loss, outputs), objective.parameters)
        self.value = objective.sign * loss.detach() + objective.penalty()
        self.theta = objective.flat(objective.parameters)
        self.products = 0

    @cached_property
    def gradient(self) -> Tensor:
        """∇f ``[P]``."""
        try:
            found = self.objective.flat(self.graph.gradient)
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise CurvatureError("the closure called backward(); it must only return the loss") from error
        return self.objective.sign * found + self.objective.decay * self.theta

    def curvature(self, kind: str = "hessian") -> Products:
        """``"hessian"``, or ``"gauss_newton"`` of a closure that returns ``(loss, outputs)``; with weight decay."""
        if kind not in ("hessian", "gauss_newton"):
            raise ValueError(f"curvature must be 'hessian' or 'gauss_newton', got {kind!r}")
        if kind == "gauss_newton" and not self.graph.term.outputs:
            raise CurvatureError("the Gauss-Newton matrix needs a closure that returns (loss, outputs)")
        return Products(self, kind)


class Products:
    """A curvature matrix ``[P, P]`` of a point, by its products; counts them."""

    symmetric = True

    def __init__(self, point: Point, kind: str):
        self.point, self.kind = point, kind
        theta = point.theta
        self.shape, self.dtype, self.device = (len(theta), len(theta)), theta.dtype, theta.device

    def __matmul__(self, v: Tensor) -> Tensor:
        objective, graph = self.point.objective, self.point.graph
        if v.dim() == 2:
            return torch.stack([self @ column for column in v.mT], 1)
        self.point.products += 1
        pieces = objective.split(v)
        hessian = self.kind == "hessian"
        found = graph.hessian(pieces) if hessian else graph.vjp(graph.loss_hessian(graph.jvp(pieces)))
        return objective.sign * objective.flat(found) + objective.decay * v
