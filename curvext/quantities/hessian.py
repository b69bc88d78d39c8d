"""Exact Hessian diagonals: by the factor wave of the whole Hessian where that is exact, else by products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..axes import BATCH, masked
from ..bending import MOST
from ..errors import CurvatureError
from ..graph import Graph, Operation
from ..hessians import tracing
from ..rules.default import MISTAKEN
from ..samples import Samples
from ..sources import is_dense, may_start, rows
from ..tangents import pull
from ..wave import Wave
from .base import Quantity, Target, WholeGraph, positive
from .bends import BendFactor, exact
from .readings import Arrived, BySample, arrived, squared, squared_by_sample


@dataclass(frozen=True)
class DiagHessian(WholeGraph, Quantity):
    """Exact diagonal of the Hessian of the loss, ``[eᵢᵀ H eᵢ]``, in the parameter's shape; saved as ``diag_h``.

    H = Σ JᵀBJ over all operations that bend, B being the Hessian of ⟨g, f(x)⟩ for one of them and J leading from the
    parameters to x. Each B = Σᵥ ±Sᵥ Sᵥᵀ is a source of columns Sᵥ. With piecewise linear activations these are the
    columns of :class:`DiagGGNExact`; a smooth one adds as many as it has features. That is exact unless a weight is put
    together with what was computed from it (tied and recurrent weights). There, where samples depend on each other,
    and where there would be many more columns than parameter entries, the diagonal is made of one Hessian-vector
    product for every entry, which is for small models; hooks of your own on tensors then take part. The columns can be
    carried in parts: ``extend(..., max_memory=)``. The scaling is the loss's.

    Args:
        chunk: products that are computed together; more is faster and takes more memory.
        products: whether to use products only.

    Raises:
        CurvatureError: if an operation of the graph cannot be differentiated twice, or PyTorch does so wrongly.

    Source: Dangel, Kunstner & Hennig, BackPACK: packing more into backprop, 2020 (columns, for chains of layers).
    """

    chunk: int = 64
    products: bool = False
    savefield = "diag_h"

    def __post_init__(self) -> None:
        positive(self, chunk=self.chunk)

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (BendFactor(),)

    def rides(self, operations: Sequence[Operation] | None, targets: Sequence[Tensor]) -> bool:
        """Whether columns give it, and there are not too many of them."""
        if self.products or not operations or tracing() or any([op.kind in MISTAKEN for op in operations]):
            return False
        sizes = {op: rows(op) for op in operations if may_start(op)}
        if sum(sizes.values()) >= 2 * sum(t.numel() for t in targets):  # a product costs about two columns
            return False
        return exact(operations) and not any([size > MOST and is_dense(op) for op, size in sizes.items()])

    def compute(self, loss: Tensor, scale: Tensor | None, targets: Sequence[Tensor]) -> Sequence[Tensor | None]:
        refuse_mistaken(loss, type(self).__name__)
        with differentiated_twice(type(self).__name__):
            return self._by_products(loss, scale, targets)

    def read(self, target: Target, *waves: Any) -> Tensor | None:
        total = None
        for source, columns in (waves[0] or {}).items():
            for value in self._squares(arrived({source: columns}, target), target):
                if total is not None:
                    total.add_(value, alpha=source.sign)
                else:
                    total = value if source.sign == 1 else value.neg_()
        return total

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def _squares(self, found: Arrived, target: Target) -> list[Tensor]:
        return [squared(value) for value in (*found.samples, *found.whole)] + [d.h.clone() for d in found.diagonal]

    def _by_products(self, loss: Tensor, scale: Tensor | None, targets: Sequence[Tensor]) -> Sequence[Tensor | None]:
        gradients = torch.autograd.grad(loss, targets, scale, create_graph=True, allow_unused=True)
        return self._diagonals(gradients, targets)

    def _diagonals(self, gradients: Sequence[Tensor | None], targets: Sequence[Tensor]) -> list[Tensor | None]:
        return [None if g is None else self._diagonal(g, x) for g, x in zip(gradients, targets, strict=True)]

    def _diagonal(self, gradient: Tensor, x: Tensor) -> Tensor:
        if not gradient.requires_grad or not x.numel():
            return torch.zeros_like(x, requires_grad=False)
        entries = [self._entries(gradient, x, start) for start in range(0, x.numel(), self.chunk)]
        return torch.cat(entries).view(x.shape)

    def _entries(self, gradient: Tensor, x: Tensor, start: int) -> Tensor:
        index = torch.arange(start, min(start + self.chunk, x.numel()), device=x.device)
        rows = torch.arange(len(index), device=x.device)
        basis = torch.zeros(len(index), x.numel(), dtype=gradient.dtype, device=x.device)
        basis[rows, index] = 1
        (products,) = pull([gradient], [x], [basis.view(-1, *x.shape)])
        return torch.zeros_like(rows, dtype=x.dtype) if products is None else products.flatten(1)[rows, index].detach()


@dataclass(frozen=True)
class BatchDiagHessian(BySample, DiagHessian):
    """Exact Hessian diagonal of every sample's part of the loss, ``[N, *P]``; :class:`DiagHessian` is their sum.

    With the loss a sum over samples, L = Σ_n ℓ_n (a mean has the 1/N in ℓ_n). Costs and arguments as there; products
    are taken for one sample at a time.

    Raises:
        CurvatureError: as there; and if samples depend on each other, a term of the loss belongs to none, or products
            are needed and ``samples=`` says that rows of the loss are no samples.
    """

    savefield = "diag_h_batch"

    def __post_init__(self) -> None:
        DiagHessian.__post_init__(self)

    def rides(self, operations: Sequence[Operation] | None, targets: Sequence[Tensor]) -> bool:
        """Also whether none of the columns start where no sample is, as those of a weight that is normalised do."""
        if super().rides(operations, targets) and not any([_bends_shared(op) for op in operations or ()]):
            return True
        if any([_has_samples_given(op) for op in operations or ()]):
            raise CurvatureError(
                "BatchDiagHessian: products are needed here (see DiagHessian), which count every row of the loss as a "
                "sample. Leave out samples=, and let the leading dimension of what the loss sums up be the samples"
            )
        return False

    def _squares(self, found: Arrived, target: Target) -> list[Tensor]:
        return [squared_by_sample(columns, target) for columns in found.parts(type(self).__name__)]

    def compute(self, loss: Tensor, scale: Tensor | None, targets: Sequence[Tensor]) -> Sequence[Tensor]:
        found = super().compute(loss, scale, targets)
        n = next((len(h) for h in found if h is not None), 0)
        return [t.new_zeros(n, *t.shape) if h is None else h for t, h in zip(targets, found, strict=True)]

    def _by_products(self, loss: Tensor, scale: Tensor | None, targets: Sequence[Tensor]) -> Sequence[Tensor | None]:
        edges, axes, n = _summed_up(loss, targets)
        gradients = _direct(loss, scale, edges)
        rows = []
        for k in range(n):
            parts = [masked(g.unsqueeze(0), axis, n)[0, k] for g, axis in zip(gradients, axes, strict=True)]
            own = torch.autograd.grad(edges, targets, parts, create_graph=True, allow_unused=True)
            rows.append(self._diagonals(own, targets))
        return [None if None in row else torch.stack(row) for row in zip(*rows, strict=True)]  # type: ignore[arg-type]


def _bends_shared(op: Operation) -> bool:
    """Whether it bends what all samples share, below the sum over them."""
    return not op.summed and may_start(op) and not any([n and a for n, a in zip(op.needs, op.axes_in, strict=True)])


def _has_samples_given(op: Operation) -> bool:
    """Whether the samples are not the rows of what the loss sums up."""
    places = [(axis, meta) for axis, meta in zip(op.axes_in, op.inputs, strict=True) if axis is not None]
    return any([axis is BATCH or (op.summed and meta.shape[axis.dim] != op.n_samples) for axis, meta in places])


def _summed_up(loss: Tensor, targets: Sequence[Tensor]) -> tuple[list[GradientEdge], list[Any], int]:
    """The tensors of which the loss is a sum over samples, roots first, their axes, and the number of samples."""
    graph = Graph([loss.grad_fn])  # type: ignore[list-item]
    places = {edge for t in targets if (edge := graph.edge_of(t)) is not None}
    operations = graph.operations(places)
    samples = Samples(operations, places)
    samples.follow()
    inputs = [place for op in operations if op.summed for place in zip(op.edges, op.axes_in, op.inputs, strict=True)]
    found = {edge: axis for edge, axis, _ in inputs if axis is not None}
    loose = [e for e, axis, m in inputs if axis is None and m is not None and (e in places or prod(m.shape) > 1)]
    if loose:
        raise CurvatureError(
            "BatchDiagHessian: products are needed here (see DiagHessian), and they cannot tell samples apart in a "
            "loss with a term that belongs to none (a penalty on the weights?). Call backward() on one term at a time, "
            "each in a block of its own"
        )
    place = {op.node: k for k, op in enumerate(operations)}
    edges = sorted(found, key=lambda edge: place.get(edge[0], len(place)))
    return [GradientEdge(*edge) for edge in edges], [found[edge] for edge in edges], samples.n or 1


def _direct(loss: Tensor, scale: Tensor | None, edges: Sequence[GradientEdge]) -> list[Tensor]:
    """Gradients at tensors, roots first, without what reaches one through those before it."""
    found: list[Tensor] = []
    for k, edge in enumerate(edges):
        (g,) = torch.autograd.grad(loss, edge, scale, create_graph=True)
        through = torch.autograd.grad(edges[:k], edge, found, create_graph=True, allow_unused=True) if k else ()
        found.append(g - sum(v for v in through if v is not None))
    return found


@contextmanager
def differentiated_twice(what: str) -> Iterator[None]:
    """Within, an operation that cannot be differentiated twice is an error that says so."""
    try:
        with torch.enable_grad():
            yield
    except CurvatureError:
        raise
    except RuntimeError as error:
        raise CurvatureError(
            f"{what} needs a graph that can be differentiated twice: {error}. For attention, run the forward "
            "pass within torch.nn.attention.sdpa_kernel(SDPBackend.MATH); HesScale needs no such thing."
        ) from error


def refuse_mistaken(loss: Tensor, what: str) -> None:
    """Refuse operations whose second derivative PyTorch has wrong."""
    for node in Graph([loss.grad_fn] if loss.grad_fn is not None else []).order:
        if node.name() in MISTAKEN:
            raise CurvatureError(
                f"{what}: PyTorch's second derivative of {node.name()} is wrong. For weight norm, write "
                "g * v / v.norm(...) with ordinary operations; HesScale has a rule of its own."
            )
