"""The objective at one place: value, gradient, curvature."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..extend import Curvature, extend
from ..operators.base import Operator
from ..operators.curvature import flat, split
from ..operators.data import Term
from ..operators.linearised import Linearised, room

if TYPE_CHECKING:
    from .objective import Closure, Objective

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
                (loss if self.objective.sign > 0 else -loss).backward(inputs=list(parameters.values()))
            return found
        finally:
            for p, (grad, values) in zip(parameters.values(), before, strict=True):
                p.grad = grad
                for name, value in values.items():
                    p.__dict__.pop(name, None)
                    if value is not None:
                        p.__dict__[name] = value


class Products(Operator):
    """A curvature matrix ``[P, P]`` of a point, weight decay included, by its products; counts them."""

    symmetric = True

    def __init__(self, point: Point, kind: str):
        self.point, self.kind = point, kind
        theta, self.domain = point.theta, point.objective.domain
        self.image, self.shape, self.dtype, self.device = self.domain, (len(theta),) * 2, theta.dtype, theta.device

    def _apply(self, v: Tensor) -> Tensor:
        objective, graph = self.point.objective, self.point.graph
        self.point.products += v.shape[1]
        chunk = graph.together(v.shape[1], room(self.device))
        found = [flat(self._product(vs, batched), batched) for vs, batched in split(objective.space, v, chunk)]
        return objective.sign * torch.cat(found, 1) + objective.decayed(v)

    def _product(self, v: list[Tensor], batched: bool) -> list[Tensor]:
        graph = self.point.graph
        if self.kind == "hessian":
            return graph.hessian(v, batched)
        return graph.vjp(graph.loss_hessian(graph.jvp(v, batched), batched), batched)
