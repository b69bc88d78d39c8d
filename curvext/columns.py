"""A memory budget for the factor wave: its columns are carried a few at a time, each few by a sweep of their own.

The widest wave takes V columns × the largest tensor on the way. What quantities read is a sum over columns, or one
result for each, so that the parts together give the same (:meth:`~curvext.quantities.base.Saved.join`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import registry
from .graph import Edge, Graph, Operation
from .output import seeds
from .quantities.waves import Factor, Part
from .sources import may_start
from .sweep import Settings, Sweep
from .wave import Wave

Arrive = Callable[[Edge, list[Any]], None]


def of_columns(waves: Iterable[Wave]) -> list[Factor]:
    """Those that carry columns."""
    return [wave for wave in waves if isinstance(wave, Factor) and wave.kind != "none"]


def reads_columns(quantity: Any) -> bool:
    """Whether a quantity is made from the factor wave."""
    return bool(of_columns(getattr(quantity, "waves", ())))


def together(operations: Sequence[Operation], waves: Sequence[Wave], budget: int | None) -> int | None:
    """How many columns keep the factor wave below ``budget`` bytes wherever it passes; ``None`` if all do."""
    factors = of_columns(waves)
    if budget is None or not factors:
        return None
    most = max(_most(operations) if wave.kind != "draws" else wave.draws for wave in factors)
    few = max(1, budget // max(1, 2 * widest(operations)))  # at an operation's outputs and at its inputs
    return few if few < most else None


def _most(operations: Sequence[Operation]) -> int:
    """No fewer than the columns of an exact factor, wherever the loss's Hessian turns out to be taken."""
    held = ((op, meta) for op in operations if may_start(op) for meta in op.inputs if meta is not None)
    return max((prod(meta.shape) // op.n_samples for op, meta in held), default=1)


def widest(operations: Sequence[Operation]) -> int:
    """Bytes of one column where it is largest; shared tensors that have no rule hold it once for every sample."""
    most = 0
    for op in operations:
        formed = op.n_samples if registry.find(op, "shared") is None else 0
        for meta, axis, need in zip(op.inputs, op.axes_in, op.needs, strict=True):
            if need:
                most = max(most, prod(meta.shape) * meta.dtype.itemsize * (formed if axis is None else 1))
    return most


def _only(waves: Sequence[Wave], part: Part) -> list[Wave]:
    """The same waves; of the factor wave, these columns alone."""
    factors = of_columns(waves)
    return [replace(wave, within=part) if isinstance(wave, Factor) and wave in factors else wave for wave in waves]


def in_parts(
    sweep: Sweep, graph: Graph, settings: Settings, loss: Tensor, gradient: Tensor | None, gather: Arrive
) -> Sweep:
    """Carry the columns that are too many for the memory budget; ``sweep`` gets the last few.

    Returns:
        The sweep that failed, or ``sweep``.
    """
    few = together(sweep.operations, sweep.kinds, settings.max_memory)
    if few is None or not sweep.targets:
        return sweep
    factors = of_columns(sweep.kinds)
    tensors = [target.tensor for target in sweep.targets.values()]
    part = Part(stop=few)
    while part.start == 0 or part.start + few < part.most:
        again = Sweep(graph, sweep.targets, _only(factors, part), settings, gather)
        again.operations = list(sweep.operations)
        again.seeds = seeds(again.operations, again.kinds, loss, gradient)
        with again:
            torch.autograd.grad(loss, tensors, gradient, retain_graph=True, allow_unused=True)
        if again.error is not None:
            return again
        part = replace(part, start=part.start + few, stop=part.start + 2 * few)
    sweep.kinds = _only(sweep.kinds, replace(part, stop=None))
    sweep.seeds = seeds(sweep.operations, sweep.kinds, loss, gradient)
    return sweep
