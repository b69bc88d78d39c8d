"""The factor wave of the whole Hessian, H = Σ Jᵀ B J: every operation that bends is a source.

B is the Hessian of ⟨g, f(x)⟩ in the inputs x of one operation f, and J leads from the parameters to x. A parameter's
block of H is had from the blocks of B in the inputs that hold the samples, if f is linear in those that the samples
share and no parameter is in both: a product of a weight with what was computed from the same weight has more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ..diagonal import bends, pass_diagonal
from ..errors import CurvatureError
from ..graph import Edge, Graph, Operation
from ..hessians import negative, positive
from ..registry import find_diagonal
from ..samples import Samples
from ..sources import loss_hessian
from ..sweep import Settings, Sweep
from .base import Target
from .waves import Factor, Waves

PARTS: dict[str, Callable[[Tensor], Tensor]] = {"positive": positive, "negative": negative, "abs": torch.abs}


@dataclass(frozen=True)
class BendFactor(Factor):
    """Columns of one part of every B: H is that of the ``"positive"`` minus that of the ``"negative"`` eigenvalues.

    Raises:
        CurvatureError: in :meth:`step`, if blocks of H are more than that.
    """

    part: str = "positive"

    def _start(self, op: Operation, g: Sequence[Tensor | None]) -> dict[int, Any]:
        return {}  # whether curvature has reached it or not, in step

    def seeds(self, output: Any) -> dict[Edge, Any]:
        return {}

    def step(self, op: Operation, g: Sequence[Tensor | None], wave: Waves) -> Waves:
        _check(op, g)
        found = list(super().step(op, g, wave))
        for i, hessian in loss_hessian(op, g).items():
            seen: list[Tensor] = []
            kept = hessian.part(lambda b, seen=seen: seen.append(PARTS[self.part](b)) or seen[0])  # type: ignore[misc]
            if any(bool(b.any()) for b in seen):
                found[i] = {**(found[i] or {}), op.node: self._columns(kept, op, i)}
        return found


def _check(op: Operation, g: Sequence[Tensor | None]) -> None:
    """That B in the inputs that hold samples is all there is."""
    holding = [i for i, (need, axis) in enumerate(zip(op.needs, op.axes_in, strict=True)) if need and axis is not None]
    shared = [i for i, (need, axis) in enumerate(zip(op.needs, op.axes_in, strict=True)) if need and axis is None]
    if not holding or not shared:
        return
    if bends(op):
        rule = find_diagonal(op)
        waves = () if rule is None else pass_diagonal(op, g, [None] * len(g))
        if rule is None or any(i < len(waves) and (w := waves[i]) is not None and bool(w.any()) for i in shared):
            raise CurvatureError("it is not linear in a tensor that the samples share")
    below = _leaves([op.edges[i][0] for i in shared])
    if not below.isdisjoint(_leaves([op.edges[i][0] for i in holding])):
        raise CurvatureError("it puts a parameter together with what was computed from the same parameter")


def _leaves(nodes: Sequence[Node]) -> set[Node]:
    stack, seen = list(nodes), set(nodes)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return {node for node in seen if not node.next_functions}


def swept(
    loss: Tensor,
    scale: Tensor | None,
    targets: Sequence[Tensor],
    most: Callable[[int, int], bool],
    read: Callable[[Target, Sequence[Any]], Any],
) -> list[Any]:
    """What ``read(target, (positive, negative))`` makes of the columns at every target.

    Args:
        most: told how many columns there will be and how many entries they have where they have most, whether to go on.

    Raises:
        CurvatureError: if not, or if it would not be exact.
    """
    graph = Graph([loss.grad_fn])  # type: ignore[list-item]
    places = {edge: Target(t, [""]) for t in targets if (edge := graph.edge_of(t)) is not None}
    found: dict[int, Any] = {}

    def arrive(edge: Edge, waves: Sequence[Any]) -> None:
        found[id(places[edge].tensor)] = read(places[edge], waves)

    sweep = Sweep(graph, places, (BendFactor(), BendFactor(part="negative")), Settings(), arrive)
    samples = Samples(sweep.operations, places)
    samples.follow()
    for edge, target in places.items():
        target.n, target.axis = samples.n, samples.axes.get(edge)
    columns = sum(_entries(op) // op.n_samples for op in sweep.operations if bends(op))
    if not most(columns, columns * max(_entries(op) for op in sweep.operations)):
        raise CurvatureError("products are cheaper")
    with sweep:
        torch.autograd.grad(loss, targets, scale, retain_graph=True, allow_unused=True)
    if sweep.error is not None:
        raise sweep.error
    return [found.get(id(t)) for t in targets]


def _entries(op: Operation) -> int:
    return max(meta.shape.numel() if hasattr(meta.shape, "numel") else 1 for meta in op.outputs)
