"""Columns of the factor wave across operations that move or scale entries, all at once: a tenth of the time of vmap.

A column has the shape of the output, so columns ``[V, *shape]`` broadcast with whatever the output broadcasts with.
Which operations these are is told by the layout of their rules of the wave "samples".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph import Operation
from ..registry import registered, rule
from . import samples as samples  # whose rules are read below


def entrywise(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """Entry by entry: the node takes all columns as one gradient, which broadcasts; what it sums up is left to vmap."""
    rows = op.vjp(s)
    return rows if all([row is None or row.dim() == s.dim() for row in rows]) else None


def viewed(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """Entries keep their order: S in the input's shape."""
    return (s.reshape(len(s), *op.inputs[-1].shape),)


# kernels of losses write their result in the shape of a single column; those of GELU in float32 do not broadcast
OTHER = ("Expand", "Loss", "CrossEntropy", "GeluBackward")
_aligned = [name for name, entry in registered("samples") if entry.layout == "aligned"]
_reshaped = [name for name, entry in registered("samples") if entry.layout == "reshaped"]
rule(*[name for name in _aligned if not any(o in name for o in OTHER)], wave="factor", how="structure")(entrywise)
rule(*_reshaped, wave="factor", how="structure")(viewed)


@rule("GeluBackward0", wave="factor", how="structure")
def sloped(op: Operation, s: Tensor, wanted: Sequence[bool]) -> tuple[Tensor]:
    """Entry by entry: S φ', the slopes from the node once."""
    return (s * op.vjp(torch.ones_like(op.self))[0],)  # type: ignore[operator]


@rule("ExpandBackward0", wave="factor", how="structure")
def expand(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """Copies: S as it is, unsummed."""
    return (s,)


@rule("TBackward0", "TBackward1", wave="factor", how="structure")
def t(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """The transpose of every column."""
    return (s.mT if s.dim() == 3 else s,)


@rule("TransposeBackward0", "TransposeBackward1", wave="factor", how="structure")
def transpose(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """The dimensions change places back."""
    rank = max(s.dim() - 1, 1)
    return (s.transpose(1 + op.dim0 % rank, 1 + op.dim1 % rank) if s.dim() > 1 else s,)


@rule("PermuteBackward0", wave="factor", how="structure")
def permute(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """The dimensions change places back."""
    dims = [d % len(op.dims) for d in op.dims]
    return (s.permute(0, *[1 + dims.index(d) for d in range(len(dims))]),)
