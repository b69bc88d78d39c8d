"""A memory budget for the factor wave: its columns are carried a few at a time, each few by a sweep of their own.

The widest wave takes V columns × the largest tensor on the way. What quantities read is a sum over columns, or one
result for each, so that the parts together give the same (:meth:`~curvext.quantities.base.Saved.join`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from . import registry
from .graph import Operation
from .quantities.base import Saved
from .quantities.waves import Factor, Part
from .sources import may_start
from .wave import Wave


def reads_columns(quantity: Any) -> bool:
    """Whether a quantity is made from the factor wave."""
    return any(isinstance(wave, Factor) for wave in getattr(quantity, "waves", ()))


def indivisible(quantity: Any) -> bool:
    """Whether a quantity must see all columns at once."""
    return reads_columns(quantity) and type(quantity).join is Saved.join


def together(operations: Sequence[Operation], waves: Sequence[Wave], budget: int | None) -> int | None:
    """How many columns keep the factor wave below ``budget`` bytes wherever it passes; ``None`` if all do."""
    factors = [wave for wave in waves if isinstance(wave, Factor)]
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


def only(waves: Sequence[Wave], part: Part) -> list[Wave]:
    """The same waves; of the factor wave, these columns alone."""
    return [replace(wave, within=part) if isinstance(wave, Factor) else wave for wave in waves]
