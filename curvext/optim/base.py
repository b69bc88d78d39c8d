"""What optimizers share that look at the loss several times a step: the closure, flat vectors, products, the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import CurvatureError
from ..extend import Curvature, extend
from ..operators.data import Term, twice_differentiable
from ..operators.linearised import Linearised
from ..solvers import FullStep, Step, reduction_ratio

Closure = Callable[[], Any]
LineSearch = Callable[..., Step]  # Armijo, StrongWolfe, FullStep, or your own
Damping = Callable[..., float]  # LevenbergMarquardt, Constant, or your own


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
    a group's parameters are moved by. After a step, :attr:`report` says what it did. A step that finds nothing lower
    leaves the parameters as they were, bit by bit, and so does one that raises.

    ``lr`` and ``weight_decay`` belong to groups. What an optimizer has to remember is in its ``state_dict()``; how it
    is set up (line search, damping rule, number of products) is not, as it comes from the constructor.

    Subclasses give ``_step(objective)``, which moves the parameters and returns a :class:`Report`. Numbers that are
    carried from step to step belong into ``self.carried``, tensors shaped like parameters into ``self.state[p]`` (see
    :meth:`recall` and :meth:`remember`): both survive ``state_dict()``. Public attributes survive copies and pickling.
    """

    second_order = True  # whether the optimizer takes a curvature_closure

    def __init__(self, params: Any, defaults: dict[str, Any]):
        defaults = {"lr": 1.0, "weight_decay": 0.0, "maximize": False, **defaults}
        super().__init__(params, defaults)
        self.report: Report | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "step"}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "weight_decay"):
            if not float(group[name]) >= 0:
                self.param_groups.pop()
                raise ValueError(f"{type(self).__name__}: {name} must be >= 0, got {group[name]}")

    @property
    def carried(self) -> dict[str, Any]:
        """Numbers that belong to all groups, kept in the first."""
        return self.param_groups[0].setdefault("carried", {})  # type: ignore[no-any-return]

    @torch.no_grad()
    def step(self, closure: Closure | None = None, curvature_closure: Closure | None = None) -> Any:  # type: ignore[override]
        """One step; returns the loss before it.

        Args:
            closure: gives the loss that is made smaller.
            curvature_closure: gives the loss whose curvature is used, on other (fewer, or more) data.

        Raises:
            CurvatureError: if there is no closure, it is not deterministic or calls ``backward``, or its loss or
                gradient is not finite.
        """
        if closure is None:
            raise CurvatureError(f"{type(self).__name__}.step needs a closure that returns the loss")
        if curvature_closure is not None and not self.second_order:
            raise TypeError(f"{type(self).__name__} uses no curvature, and so no curvature_closure")
        self.param_groups[0]["carried"] = dict(self.carried)  # an earlier state_dict() keeps its own
        objective = Objective(self, closure, curvature_closure)
        try:
            if not self.carried.get("checked"):
                objective.check()
                self.carried["checked"] = True
            self.report = self._step(objective)
        except BaseException:
            objective.move(None)
            raise
        return objective.loss

    def _step(self, objective: Objective) -> Report:
        raise NotImplementedError

    def recall(self, name: str, objective: Objective) -> Tensor | None:
        """A flat vector ``[P]``, or rows ``[..., P]``, remembered under a name; ``None`` if a parameter has none."""
        rows: list[Tensor] = []
        for p in objective.parameters:
            v = self.state[p].get(name)
            if v is None or (rows and v.shape[: v.dim() - p.dim()] != rows[0].shape[:-1]):
                return None
            rows.append(v.reshape(*v.shape[: v.dim() - p.dim()], p.numel()))
        return torch.cat(rows, -1)

    def remember(self, name: str, value: Tensor, objective: Objective) -> None:
        """Keep a flat vector or rows, in the parameters' states."""
        for p, piece in zip(objective.parameters, objective.split(value), strict=True):
            self.state[p] = {**self.state[p], name: piece.clone()}

    def forget(self, name: str, objective: Objective) -> None:
        """Drop what was remembered under a name."""
        for p in objective.parameters:
            self.state[p] = {k: v for k, v in self.state[p].items() if k != name}


@dataclass(frozen=True)
class Found:
    """What :meth:`Objective.search` found.

    Attributes:
        name: of the direction, ``None`` if nothing lower was found along any.
        step: what the line search returned; its ``size`` is zero then.
        d: the step taken ``[P]``, ``lr`` and ``size`` in it.
        reason: in words.
        point: there, if the search has made one.
    """

    name: str | None
    step: Step
    d: Tensor
    reason: str
    point: Point | None = None

    def report(self, point: Point, products: int | None = None, **details: Any) -> Report:
        """The report of a step that did this from a point."""
        objective = point.objective
        return Report(
            before=float(point.value),
            after=self.step.value,
            moved=self.name is not None,
            reason=self.reason,
            products=point.products if products is None else products,
            evaluations=objective.evaluations,
            details={"step": self.step.size, "gradient": float(torch.linalg.vector_norm(point.gradient)), **details},
        )

    def ratio(self, point: Point, slope: float, curvature: float) -> float:
        """ρ = (f(θ + d) - f(θ)) / (α ``slope`` + ½ α² ``curvature``), α the size of the step; -inf without a step."""
        if self.name is None:
            return -math.inf
        α = self.step.size
        return reduction_ratio(self.step.value - float(point.value), α * slope + α**2 / 2 * curvature)


class Objective:
    """The function of a flat step d ``[P]`` that an optimizer makes smaller: f(θ + d), θ the parameters at the start.

    Attributes:
        parameters: those that require a gradient, over all groups.
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
            loss, outputs = found if isinstance(found, tuple) and len(found) == 2 else (found, [])
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
            trials = _Trials(self, d, getattr(line_search, "slopes", False), points)
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


class _Trials:
    """α -> f(θ + α d), with the slope there for line searches that ask for it; knows the last ``size`` and point."""

    def __init__(self, objective: Objective, d: Tensor, slopes: bool, points: bool):
        self.objective, self.d, self.slopes, self.points = objective, d, slopes, points or slopes
        self.size = 0.0
        self.point: Point | None = None

    def __call__(self, α: float) -> Any:
        self.size, self.point = α, None
        if not self.points:
            return float(self.objective.value(α * self.d))
        self.point = point = self.objective.point(α * self.d, products=False)
        value = float(point.value)
        if not self.slopes:
            return value
        return value, float(point.gradient.dot(self.d)) if math.isfinite(value) else math.nan

    def at(self, α: float) -> Point | None:
        return self.point if self.size == α else None


BACKWARD = "the closure called backward(); it must only return the loss"


class Point:
    """The objective at one place: its value, gradient and curvature products; the graph is kept while this is."""

    def __init__(self, objective: Objective, closure: Closure, products: bool | str = True):
        loss, outputs = objective.call(closure)
        if not loss.requires_grad:
            raise CurvatureError("the closure's loss does not depend on the parameters through a graph")
        self.objective, self.closure, self.kept = objective, closure, products
        self.graph = Linearised(Term(loss, outputs), objective.parameters)
        self.value = objective.sign * loss.detach() + objective.penalty()
        self.theta = objective.flat(objective.parameters)
        self.products = 0

    @cached_property
    def gradient(self) -> Tensor:
        """∇f ``[P]``."""
        try:
            pieces = self.graph.gradient if self.kept in (True, "hessian") else self._plain()
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise CurvatureError(BACKWARD) from error
        if any(g.layout is not torch.strided for g in pieces):
            raise CurvatureError("a gradient is sparse; use dense ones (sparse=False in nn.Embedding)")
        found = self.objective.sign * self.objective.flat(pieces) + self.objective.decay * self.theta
        if not bool(found.isfinite().all()):
            raise CurvatureError(f"the gradient is not finite, and the loss is {float(self.graph.term.value):g}")
        return found

    def _plain(self) -> list[Tensor]:
        """The gradient of the loss without a graph of its own."""
        parameters = self.objective.parameters
        found = torch.autograd.grad(self.graph.term.value, parameters, retain_graph=bool(self.kept), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def curvature(self, kind: str = "hessian") -> Products:
        """``"hessian"``, or ``"gauss_newton"`` of a closure that returns ``(loss, outputs)``; with weight decay."""
        if kind not in ("hessian", "gauss_newton"):
            raise ValueError(f"curvature must be 'hessian' or 'gauss_newton', got {kind!r}")
        if kind == "gauss_newton" and not self.graph.term.outputs:
            raise CurvatureError("the Gauss-Newton matrix needs a closure that returns (loss, outputs)")
        return Products(self, kind)

    def quantities(self, *quantities: Any, **options: Any) -> Curvature:
        """Quantities of ``extend`` for the objective without weight decay, by ``str`` of the parameter's place.

        They come from one more evaluation of the closure, so before the parameters move. Parameters that the loss does
        not depend on have none. Nothing is left on any, ``grad`` included.
        """
        parameters = {str(i): p for i, p in enumerate(self.objective.parameters)}
        fields = [getattr(q, "quantity", q).savefield for q in quantities]
        before = [(p.grad, {f: p.__dict__.get(f) for f in fields}) for p in parameters.values()]
        loss, _ = self.objective.call(self.closure, twice=False)
        try:
            with torch.enable_grad(), extend(parameters, *quantities, **options) as found:
                for p in parameters.values():
                    p.grad = None
                (loss if self.objective.sign > 0 else -loss).backward()
            return found
        finally:
            for p, (grad, values) in zip(parameters.values(), before, strict=True):
                p.grad = grad
                for name, value in values.items():
                    p.__dict__.pop(name, None)
                    if value is not None:
                        p.__dict__[name] = value


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
