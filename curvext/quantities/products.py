"""Products with a parameter's own block of a curvature matrix, as functions ``[V, *P] -> [V, *P]``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..factor import pass_columns, reduced_columns
from ..graph import Edge, Graph, Operation
from ..sources import is_dense, may_start
from ..tangents import Above, pass_tangents, pull
from ..wave import Wave
from .base import Quantity, Saved, Target, WholeGraph
from .bends import BendFactor, exact
from .hessian import differentiated_twice, refuse_mistaken
from .waves import Factor


@dataclass(frozen=True, eq=False)
class BlockProduct:
    """A function ``[V, *P] -> [V, *P]``: V products with a matrix, the sum of ``terms``.

    Raises:
        ValueError: if what is given is not of the shape ``[V, *P]``.
    """

    terms: tuple[Callable[[Tensor], Tensor], ...]
    shape: tuple[int, ...]

    def __call__(self, vectors: Tensor) -> Tensor:
        if tuple(vectors.shape[1:]) != self.shape or vectors.dim() != len(self.shape) + 1:
            raise ValueError(
                f"expected vectors [V, {', '.join(map(str, self.shape))}], got {tuple(vectors.shape)}; one is v[None]"
            )
        found = [term(vectors) for term in self.terms if len(vectors)]
        return sum(found[1:], start=found[0]) if found else torch.zeros_like(vectors)

    def __add__(self, other: BlockProduct) -> BlockProduct:
        return BlockProduct(self.terms + other.terms, self.shape)


class _Products(Saved):
    """What quantities that are functions have in common."""

    def zero(self, target: Target) -> BlockProduct:
        return BlockProduct((), tuple(target.tensor.shape))


class _Path:
    """What leads from one edge of a graph to others above it; the graph must be retained.

    Operations are called one by one: a backward pass would run the user's hooks on tensors, which may change gradients.

    Args:
        ends: the edges above.
    """

    def __init__(self, graph: Graph, edge: Edge, ends: Collection[Edge]):
        self.edge, self.ends = edge, set(ends)
        self.operations = graph.operations({edge})

    def up(self, vectors: Tensor) -> dict[Edge, Tensor]:
        """J v in all ends that depend on the edge, for v ``[V, *shape]`` at it."""
        tangents = {self.edge: vectors}
        for op in reversed(self.operations):
            if self.ends <= tangents.keys():
                break
            given = [tangents.get(edge) for edge in op.edges]
            if any([t is not None for t in given]):
                found = pass_tangents(op, given)
                tangents.update({(op.node, k): t for k, t in enumerate(found) if t is not None})
        return {edge: tangents[edge] for edge in self.ends & tangents.keys()}

    def down(self, u: Mapping[Edge, Tensor]) -> Tensor | None:
        """Σ Jᵀu of what the ends have, ``[V, *shape]``."""
        waiting = dict(u)
        for op in self.operations:
            given = [] if op.is_target else [waiting.pop((op.node, k), None) for k in range(len(op.outputs))]
            if any([columns is not None for columns in given]):
                for i, columns in enumerate(pass_columns(op, given, op.needs)):
                    if columns is not None:
                        columns, below = reduced_columns(op, columns, i), op.edges[i]
                        waiting[below] = waiting[below] + columns if below in waiting else columns
        return waiting.get(self.edge)


@dataclass(eq=False)
class _Curved:
    """Σ JᵀBJ v over every B above: up as tangents, B, and down as gradients."""

    x: Tensor
    hessians: Sequence[Above]

    @cached_property
    def _path(self) -> _Path:
        ends = {edge for above in self.hessians for edge in above.pieces}
        graph = next(op.graph for above in self.hessians for _, op, _ in above.pieces.values())
        edge = graph.edge_of(self.x)
        assert edge is not None
        return _Path(graph, edge, ends)

    @torch.no_grad()
    def __call__(self, vectors: Tensor) -> Tensor:
        tangents = self._path.up(vectors)
        total: dict[Edge, Tensor] = {}
        for above in self.hessians:
            for edge, u in above.product(tangents).items():
                total[edge] = total[edge] + u if edge in total else u
        found = self._path.down(total)
        return torch.zeros_like(vectors) if found is None else found


class _OfHessians(_Products, Quantity):
    retains: ClassVar[bool] = True

    def read(self, target: Target, *waves: Any) -> BlockProduct | None:
        if not waves[0]:
            return None
        return BlockProduct((_Curved(target.tensor, list(waves[0].values())),), tuple(target.tensor.shape))


@dataclass(frozen=True)
class GGNMP(_OfHessians):
    """Products with the parameter's block of the Gauss-Newton matrix: ``p.ggnmp(v)`` for v ``[V, *P]``.

    JᵀBJ v is had by going up to B with J and down again with Jᵀ, whose cost does not depend on the number of outputs.
    The graph stays in memory as long as one of the functions does, so delete them (``del p.ggnmp``) when they are no
    longer needed; a new block does.

    Raises:
        CurvatureError: in ``backward()``, if the loss is not convex in the model's output; by the function, if an
            operation has neither a rule of the wave "tangent" nor a backward that can be differentiated.
    """

    savefield = "ggnmp"

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (Factor("none"),)


@dataclass(frozen=True)
class PCHMP(_OfHessians):
    """Products with the parameter's block of the positive-curvature Hessian: ``p.pchmp(v)`` for v ``[V, *P]``.

    H = Σ JᵀBJ over all operations that bend (:mod:`curvext.quantities.bends`), with the eigenvalues of every B changed
    so that none is negative. For elementwise functions B = diag(φ'' g). BackPACK's products have g twice there.

    Args:
        modify: ``"clip"``: negative eigenvalues are left out; ``"abs"``: their sign is.

    Raises:
        ValueError: for another ``modify``.
        CurvatureError: in ``backward()``, if a weight is put together with what was computed from it (tied or recurrent
            weights) or complex tensors bend: its block is more than that sum; and if samples depend on each other.

    Source: Chen, Chou & Chang, BDA-PCH, 2018, https://arxiv.org/abs/1802.06502.
    """

    modify: str = "clip"
    savefield = "pchmp"

    def __post_init__(self) -> None:
        if self.modify not in ("clip", "abs"):
            raise ValueError(f"PCHMP: modify must be 'clip' or 'abs', got {self.modify!r}")

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (BendFactor("none", part="positive" if self.modify == "clip" else "abs"),)


@dataclass(frozen=True)
class HMP(_OfHessians, WholeGraph):
    """Products with the parameter's block of the Hessian: ``p.hmp(v)`` for v ``[V, *P]``; exact on any graph.

    H v = Σ JᵀBJ v over all operations that bend (:mod:`curvext.quantities.bends`), where each of them has a B in closed
    form and that is exact; elsewhere the gradient is differentiated once more, as hooks of your own on tensors make it.
    The graph stays in memory as long as one of the functions does, as with :class:`GGNMP`.

    Raises:
        CurvatureError: if an operation of the graph cannot be differentiated twice, or PyTorch does so wrongly.
    """

    savefield = "hmp"

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (BendFactor("none", part="all"),)

    def rides(self, operations: Sequence[Operation] | None, targets: Sequence[Tensor]) -> bool:
        """Whether no B has to be formed."""
        if not operations or any([may_start(op) and is_dense(op) for op in operations]):
            return False
        return exact(operations)

    def compute(self, loss: Tensor, scale: Tensor | None, targets: Sequence[Tensor]) -> list[Any]:
        refuse_mistaken(loss, "HMP")
        with differentiated_twice("HMP"):
            gradients = torch.autograd.grad(loss, targets, scale, create_graph=True, allow_unused=True)
        return [
            None if g is None or not g.requires_grad else BlockProduct((_Differentiated(g, x),), tuple(x.shape))
            for g, x in zip(gradients, targets, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Differentiated:
    gradient: Tensor
    x: Tensor

    def __call__(self, vectors: Tensor) -> Tensor:
        with differentiated_twice("HMP"):
            (products,) = pull([self.gradient], [self.x], [vectors])
        return torch.zeros_like(vectors) if products is None else products.detach()
