"""The model's output, where its user says what that is: ``z = curvext.output(model(x))``.

The Gauss-Newton matrix G = JᵀBJ depends on where the loss is split into a model and a convex function of its output. By
default that is the topmost nonlinear operation under the loss (:mod:`curvext.sources`); a mark puts it elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils._pytree import tree_map_only

from .bending import Bending, derivative, twice_differentiable
from .errors import CurvatureError
from .graph import Edge, Operation
from .hessians import LossHessian, convex
from .rules.default import UNBATCHED
from .sources import may_start
from .wave import Wave

T = TypeVar("T")
MARK = "curvext.output"
COPY = "CloneBackward0"  # a mark is on a copy: a view would lose it when written to in place


@torch.compiler.disable
def output(z: T) -> T:
    """Mark the model's output, so that B in G = JᵀBJ is the Hessian of the loss in it.

        with extend(model, DiagGGNExact()):
            z = curvext.output(model(x))
            (z - y).cosh().log().mean().backward()

    B is computed by automatic differentiation of everything between the mark and the loss: for every sample, or for
    all together where the loss mixes samples; jointly in all marked tensors. It costs as many products with that part
    of the graph as a sample has outputs, and an eigendecomposition; the closed forms for common losses are faster.
    Nothing but the quantities made from the Gauss-Newton matrix looks at marks; for all others they are copies.

    Args:
        z: a tensor, or tuples, lists and dictionaries of them.

    Returns:
        The same with copies of the tensors; those that require no gradient as they are.

    Raises:
        ValueError: if there is no tensor, or one is complex.
        CurvatureError: in ``backward()``, if B has negative eigenvalues, if one marked tensor is computed from another,
            if curvature of the loss reaches a parameter past the marks, or if B is too large or cannot be had.
    """
    marked: list[Tensor] = []
    found = tree_map_only(Tensor, lambda x: _marked(x, marked), z)
    if not marked:
        raise ValueError(f"curvext.output: expected tensors, got {type(z).__name__} without any")
    return found


def _marked(x: Tensor, marked: list[Tensor]) -> Tensor:
    if x.is_complex():
        raise ValueError("curvext.output: a complex tensor has no Hessian of its own; mark torch.view_as_real(z)")
    marked.append(x)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    copy = x.clone()
    cast(Any, copy.grad_fn).metadata[MARK] = True
    return copy


def convex_in_output(b: Tensor) -> Tensor:
    """The eigenvalues of a convex loss."""
    try:
        return convex(b)
    except CurvatureError:
        raise CurvatureError(
            "the loss is not convex in the tensors marked by curvext.output, so that its Hessian in them has no real "
            "factor. Mark a tensor in which it is convex (the mean of a Gaussian, not its variance), or use HesScale, "
            "DiagHessian or HMP"
        ) from None


class Output:
    """The marked tensors of a graph and the loss's Hessian in them.

    Args:
        marks: the operations that made them.
        above: those between them and the loss.
        loss, gradient: as in ``loss.backward(gradient)``.
    """

    def __init__(self, marks: Sequence[Operation], above: Sequence[Operation], loss: Tensor, gradient: Tensor | None):
        self.marks, self.above, self.loss, self.gradient = marks, above, loss, gradient

    @cached_property
    def hessians(self) -> Mapping[Node, LossHessian]:
        """B, by mark; without those that the loss is linear in."""
        edges = {op.node: GradientEdge(op.node, 0) for op in self.marks}
        with torch.enable_grad(), twice_differentiable():
            found = torch.autograd.grad(self.loss, list(edges.values()), self.gradient, create_graph=True)
        together = not any(op.is_python or op.kind in UNBATCHED for op in self.above)

        def product(j: Node, i: Node, v: Tensor, batched: bool) -> Tensor | None:
            return derivative(parts[j], edges[i], v, batched and together)

        parts = dict(zip(edges, found, strict=True))
        axes = {op.node: op.axes_out[0] for op in self.marks}
        return Bending(parts, axes, self.marks[0].n_samples, product).hessians(alone=False)


def seeds(
    operations: Sequence[Operation], waves: Sequence[Wave], loss: Tensor, gradient: Tensor | None
) -> dict[Edge, list[Any]]:
    """What ``waves`` start with at the marks of a graph; ``operations`` from the roots down."""
    marks = [op for op in operations if op.name == COPY and MARK in cast(Any, op.node).metadata]
    if not marks:
        return {}
    output = Output(marks, _above(operations, {op.node for op in marks}), loss, gradient)
    found: dict[Edge, list[Any]] = {(op.node, 0): [None] * len(waves) for op in marks}
    for q, wave in enumerate(waves):
        for edge, value in wave.seeds(output).items():
            found[edge][q] = value
    return found


def _above(operations: Sequence[Operation], marks: set[Node]) -> list[Operation]:
    """The operations of the loss; they are told.

    Raises:
        CurvatureError: if the marks are below one another, or curvature of the loss goes past them.
    """
    leading = set(marks)
    above: list[Operation] = []
    for op in reversed(operations):
        if any(node in leading for node, _ in op.edges):
            if op.node in marks:
                raise CurvatureError(
                    "curvext.output: a marked tensor is computed from another one. Mark either, or what both are from"
                )
            leading.add(op.node)
            above.append(op)
    bent: set[Node] = set()
    for op in reversed(above):
        if op.node in bent or (may_start(op) and _bends(op)):
            below = [edge[0] for edge, need in zip(op.edges, op.needs, strict=True) if need]
            if any(node not in leading for node in below):
                raise CurvatureError(
                    f"curvext.output: {op.name} puts the marked output together with something trained that is not "
                    "marked. Mark that as well: z, s = curvext.output((z, s))"
                )
            bent.update(node for node in below if node is not None)
    for op in above:
        op.above = True
    return above


def _bends(op: Operation) -> bool:
    """Whether the derivative of an operation depends on its inputs."""
    with torch.enable_grad():
        products = op.vjp(*(torch.ones(meta.shape, dtype=meta.dtype, device=meta.device) for meta in op.outputs))
    return any(product is not None and product.requires_grad for product in products)
