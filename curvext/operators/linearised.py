"""A batch's graph, differentiated once and kept: products without running the model again.

J v is the derivative in u of the vector-Jacobian product uᵀJ, which is linear in u (the double-backward trick); it
needs no operation to have a forward mode, and costs what a forward-mode product costs: two products a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..diagonal import bends
from ..errors import CurvatureError
from ..graph import Graph, edge_of
from ..sweep import Settings
from ..tangents import pull
from .data import Term

Tensors = list[Tensor]
FEWEST = 8  # columns for which carrying them together pays


class Linearised:
    """One term of the loss at the current parameters. Products take tensors shaped like what they multiply, or with K
    columns in front, ``[K, *shape]``, if ``batched``.
    """

    def __init__(self, term: Term, parameters: Sequence[Tensor], index: int = 0):
        self.term, self.parameters, self.index = term, list(parameters), index
        self._remembered: Any = None

    def remembered(self, compute: Callable[[Linearised], Any]) -> Any:
        """``compute(self)``, once."""
        if self._remembered is None:
            self._remembered = compute(self)
        return self._remembered

    @cached_property
    def gradient(self) -> Tensors:
        """∂ℓ/∂θ, differentiable."""
        return differentiable([self.term.value], self.parameters)

    @cached_property
    def output_gradient(self) -> Tensors:
        """∂ℓ/∂z, differentiable."""
        if not self.term.outputs:
            raise CurvatureError("the model's outputs do not depend on the parameters")
        return differentiable([self.term.value], self.term.outputs)

    @cached_property
    def _adjoint(self) -> tuple[Tensors, Tensors]:
        """u and uᵀJ, differentiable in u."""
        u = [torch.zeros_like(z, requires_grad=True) for z in self.term.outputs]
        return u, differentiable(self.term.outputs, self.parameters, u)

    def hessian(self, v: Tensors, batched: bool = False) -> Tensors:
        """H v."""
        return derivative(self.gradient, self.parameters, v, batched)

    def jvp(self, v: Tensors, batched: bool = False) -> Tensors:
        """J v, for every output tensor."""
        u, pulled = self._adjoint
        return derivative(pulled, u, v, batched)

    def vjp(self, u: Tensors, batched: bool = False) -> Tensors:
        """Jᵀ u."""
        return derivative(self.term.outputs, self.parameters, u, batched)

    def loss_hessian(self, u: Tensors, batched: bool = False) -> Tensors:
        """B u, B the Hessian of ℓ in the outputs."""
        if self._linear:
            raise CurvatureError(
                "the loss is linear in the model's outputs, so the Gauss-Newton matrix is zero. Let the model return "
                "what goes into its last nonlinear operation (logits instead of log-probabilities)"
            )
        return derivative(self.output_gradient, self.term.outputs, u, batched)

    @cached_property
    def _linear(self) -> bool:
        """Whether no operation between outputs and loss bends anything."""
        targets = {edge_of(z): i for i, z in enumerate(self.term.outputs)}
        operations = Graph([edge_of(self.term.value)[0]]).operations(targets, Settings())
        return not any((bends(op) and any(op.needs)) or sum(op.needs) > 1 for op in operations)

    def together(self, columns: int, memory: int) -> int:
        """How many columns to carry at once within some bytes."""
        fit = memory // max(1, self.column_bytes) if columns > 1 else 1
        return min(columns, fit) if fit >= FEWEST else 1

    @cached_property
    def column_bytes(self) -> int:
        """About the memory of one column on its way through the graphs."""
        roots = [self.term.value, *self.term.outputs]
        return 3 * sum(_bytes(node) for node in _nodes(roots)) + 3 * sum(p.nbytes for p in self.parameters)


def room(device: torch.device) -> int:
    """The bytes that columns may take on their way, if nothing is said: a CPU's cache, or 1 GiB."""
    return 2**22 if device.type == "cpu" else 2**30


def differentiable(outputs: Tensors, inputs: Tensors, u: Tensors | None = None) -> Tensors:
    """uᵀ∂outputs/∂inputs with its graph; zeros where there is no path."""
    if not any(y.requires_grad for y in outputs):
        return [torch.zeros_like(x) for x in inputs]
    with torch.enable_grad():
        found = torch.autograd.grad(outputs, inputs, u, create_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def derivative(outputs: Tensors, inputs: Tensors, u: Tensors, batched: bool) -> Tensors:
    """uᵀ∂outputs/∂inputs, the graph kept; ``batched``: for all columns of u at once. Zeros where there is no path."""
    pairs = [(y, v) for y, v in zip(outputs, u, strict=True) if y.requires_grad]
    leading = u[0].shape[:1] if batched else torch.Size()
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs:
        ys, vs = [y for y, _ in pairs], [v if batched else v.unsqueeze(0) for _, v in pairs]
        found = pull(ys, inputs, vs)
    return [
        x.new_zeros(leading + x.shape) if g is None else g.detach().view(leading + x.shape)
        for x, g in zip(inputs, found, strict=True)
    ]


def _nodes(roots: Tensors) -> Iterator[Any]:
    stack = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def _bytes(node: Any) -> int:
    metas = getattr(node, "_input_metadata", ())
    return sum(torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in metas)
