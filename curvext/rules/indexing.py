"""Gathers and scatters: matrices of zeros and ones, except where several entries are reduced to one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .default import default
from .structure import constant, scale, select, selection

Waves = Any

# y takes entries of x
selection(
    "GatherBackward0",
    "IndexBackward0",
    "IndexSelectBackward0",
    "MaskedSelectBackward0",
    "TakeBackward0",
    "UnsafeIndexBackward0",
    "UnsafeMaskedIndexBackward0",
)
# y is x with some entries replaced
selection(
    "AsStridedScatterBackward0",
    "DiagonalScatterBackward0",
    "FillBackward1",
    "FillBackward3",
    "IndexCopyBackward0",
    "IndexFillBackward0",
    "IndexFillBackward1",
    "MaskedScatterBackward0",
    "MaskedScatterBackwardBackward0",
    "ScatterBackward0",
    "ScatterBackward1",
    "SelectScatterBackward0",
    "SliceInverseBackward0",
    "SliceScatterBackward0",
)
# y is x with entries added to some of its own
selection("ScatterAddBackward0", "UnsafeMaskedIndexPutAccumulateBackward0", coincident=False)


constant("FillBackward0", "FillBackward2", "ZeroBackward0")


def index_put(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """x with some entries replaced by, or increased by, those of another tensor: h_x = Jᵀ h."""
    if op.coincident and op.accumulate:
        return default(op, None, [h])
    return select(op, g, h)


for _wave in ("diagonal", "complex"):
    rule(
        *("IndexPutBackward0", "IndexPutImplBackward0", "PutBackward0", "UnsafeIndexPutBackward0"),
        wave=_wave,
        coincident=True,
        linear=True,
        additive=True,
    )(index_put)


@rule("IndexAddBackward0", linear=True, additive=True)
def index_add(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = x + α P s with a selection P: h_x = h, h_s = α² Pᵀ h."""
    if h is None:
        return None
    pulled = op.vjp(h)[1] if op.needs[1] else None
    return h, (pulled if pulled is None or op.alpha == 1 else op.alpha * pulled)


@rule("IndexReduceBackward0", "ScatterReduceBackward0", linear=lambda op: op.reduce != "prod")
def scatter_reduce(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """Sum, mean, product or extremum of entries that go to one place: h = (Jᵀ1) ∘ (Jᵀh).

    Every entry feeds one output; a product is linear in each of its factors, so that it bends off the diagonal only.
    """
    return scale(op, None, h)
