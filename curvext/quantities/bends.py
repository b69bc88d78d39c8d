"""The factor wave of the whole Hessian, H = Σ Jᵀ B J: every operation that bends is a source.

B is the Hessian of ⟨g, f(x)⟩ in the inputs x of one operation f, and J leads from the parameters to x. A parameter's
block of H is had from the blocks of B in the inputs that hold the samples, if f is linear in those that the samples
share and no parameter is in two of its inputs: a product of a weight with what was computed from the same weight has
more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..diagonal import bends, pass_diagonal
from ..errors import CurvatureError
from ..graph import Edge, Operation
from ..hessians import negative, positive
from ..registry import find_diagonal
from ..sources import loss_hessian, may_start
from .waves import Factor, Source

PARTS: dict[str, tuple[tuple[int, Callable[[Tensor], Tensor]], ...]] = {
    "all": ((1, lambda b: b),),
    "signed": ((1, positive), (-1, negative)),
    "positive": ((1, positive),),
    "abs": ((1, torch.abs),),
}


@dataclass(frozen=True)
class BendFactor(Factor):
    """Columns of every B.

    Args:
        part: ``"signed"``: those of the positive and, with sign -1, of the negative eigenvalues, which make H;
            ``"positive"``: the former alone; ``"abs"``: all count as positive; ``"all"``: B as it is, without columns.
    """

    part: str = "signed"

    def check(self, operations: Sequence[Operation]) -> None:
        """That blocks of H are no more than that sum.

        Raises:
            CurvatureError: if they are.
        """
        if found := next(_entangled(operations), None):
            op, why = found
            raise CurvatureError(f"{op.kind} {why}, so that a block of H is more than Σ JᵀBJ; use HMP or GGNMP")

    def seeds(self, output: Any) -> dict[Edge, Any]:
        return {}  # it starts at every operation of the loss

    def _sources(self, op: Operation, g: Sequence[Tensor | None], reached: bool) -> dict[Source, dict[int, Any]]:
        hessians = loss_hessian(op, g)
        found: dict[Source, dict[int, Any]] = {}
        for sign, of in PARTS[self.part] if hessians else ():
            parts = {i: hessian.part(of) for i, hessian in hessians.items()}
            columns = {i: self._columns(part, op, i) for i, part in parts.items() if not part.is_zero}
            if columns:
                found[Source(op.node, sign)] = columns
        return found


def exact(operations: Sequence[Operation]) -> bool:
    """Whether blocks of H are had from the columns."""
    return next(_entangled(operations), None) is None


def _entangled(operations: Sequence[Operation]) -> Iterator[tuple[Operation, str]]:
    """Operations for which they are not, and why."""
    below = _leaves(operations) if operations else {}
    for op in operations:
        if op.is_complex and may_start(op):
            yield op, "bends complex numbers, in which its second derivatives are no Hessian"
        shared = [need and axis is None for need, axis in zip(op.needs, op.axes_in, strict=True)]
        if not any(shared) or shared == list(op.needs):
            continue
        if bends(op) and not _linear(op, shared):
            yield op, "is not linear in a tensor that the samples share"
        places = [
            (below[node], alone) for (node, _), need, alone in zip(op.edges, op.needs, shared, strict=True) if need
        ]
        if any([a & b for (a, one), (b, other) in combinations(places, 2) if one or other]):
            yield op, "puts a parameter together with what was computed from the same parameter"


def _leaves(operations: Sequence[Operation]) -> dict[Node, int]:
    """The leaves below every node, one bit for each."""
    found: dict[Node, int] = {}
    graph = operations[0].graph
    for node in graph.order:
        found[node] = 0 if graph.edges[node] else 1 << len(found)
        for child, _ in graph.edges[node]:
            found[node] |= 0 if child is None else found[child]
    return found


@torch.no_grad()
def _linear(op: Operation, inputs: Sequence[bool]) -> bool:
    """Whether the second derivative in each of these inputs is zero, by its rule and at some gradient."""
    if find_diagonal(op) is None:
        return False
    generator = torch.Generator().manual_seed(0)
    g = [torch.rand(meta.shape, generator=generator).to(meta.device, meta.dtype) for meta in op.outputs]
    waves = pass_diagonal(op, g, [None] * len(g))
    return not any(asked and w is not None and bool(w.any()) for asked, w in zip(inputs, waves, strict=False))
