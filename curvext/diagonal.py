"""The diagonal wave: equation (2) across one operation, and through a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import registry
from .graph import Edge, Graph, Operation, edge_of
from .rules.default import default
from .sweep import Settings, Sweep
from .wave import Wave

Waves = Sequence[Tensor | None]


def pass_diagonal(op: Operation, g: Waves | None, h: Waves, *variants: str) -> Waves:
    """Equation (2) across one operation, by its rule if it has one, else by the default.

    Args:
        op: the operation.
        g: gradients at its outputs, or ``None`` to leave out the second term of (2).
        h: diagonal waves at its outputs, ``None`` where zero.
        variants: other waves whose rules are preferred, such as ``"bl89"``.
    """
    zero = _is_zero(h)
    if g is not None and _is_zero(g):
        g = None
    if zero and g is None:
        return ()
    rule = registry.find_diagonal(op, *variants)
    if rule is not None and rule.outputs == "all":
        waves = rule.function(op, g, None if zero else h)
    elif rule is not None and (len(h) == 1 or (_is_zero(h[1:]) and _is_zero((g or ())[1:]))):
        waves = rule.function(op, None if g is None else g[0], h[0])
    else:
        return default(op, g, None if zero else h)
    if waves is None:
        return ()
    return (waves,) if isinstance(waves, Tensor) else waves


def bends(op: Operation, *variants: str) -> bool:
    """Whether the second term of (2) may be other than zero."""
    rule = registry.find_diagonal(op, *variants)
    return rule is None or op.coincident or not rule.is_linear(op)


def _is_zero(waves: Waves) -> bool:
    return not any([wave is not None for wave in waves])  # a list: this runs for every node


def through(
    results: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    g: Sequence[Tensor | None] | None,
    h: Sequence[Tensor | None] | None,
    settings: Settings,
) -> list[Tensor | None]:
    """The diagonal wave through a graph of its own, from ``results`` to the leaves ``inputs``.

    Args:
        results: outputs of the graph (``None``: not there).
        inputs: leaf tensors; those that require no gradient get ``None``.
        g, h: gradient and wave at each of the results, ``None`` where zero; ``g=None`` leaves out the second term
            of equation (2) in every step.
    """
    kept = [k for k, y in enumerate(results) if y is not None and y.requires_grad]
    ys: list[Any] = [results[k] for k in kept]
    waves: dict[Edge, Any] = {}
    targets = {edge_of(x): i for i, x in enumerate(inputs) if x is not None and x.requires_grad}
    seeds = {edge_of(y): [h[k]] for k, y in zip(kept, ys, strict=True) if h is not None and h[k] is not None}
    carrier = _Through(residual=g is not None)
    sweep = Sweep(Graph(edge_of(y)[0] for y in ys), targets, (carrier,), settings, waves.__setitem__, seeds)
    gs: list[Any] = [torch.zeros_like(y) if g is None or g[k] is None else g[k] for k, y in zip(kept, ys, strict=True)]
    with sweep:
        torch.autograd.grad(ys, [x for x in inputs if x is not None and x.requires_grad], gs, allow_unused=True)
    if sweep.error is not None:
        raise sweep.error
    found = {targets[edge]: wave for edge, (wave,) in waves.items()}
    return [found.get(i) for i in range(len(inputs))]


@dataclass(frozen=True)
class _Through(Wave):
    """A diagonal wave in a graph of its own."""

    residual: bool = True

    def step(self, op: Operation, g: Sequence[Tensor | None], h: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        return pass_diagonal(op, g if self.residual else None, h)
