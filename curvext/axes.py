"""Where a tensor holds the samples, and tensors with their samples in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """Dimension ``dim`` is outer × N × inner: entry j of it belongs to sample (j // inner) % N."""

    dim: int
    inner: int = 1


#: The axis of every tensor when the whole batch counts as one sample.
BATCH = Axis(-1)
State = Axis | None


def front(x: Tensor, axis: Axis, n: int, leading: int = 0) -> Tensor:
    """``x`` with its samples in front, ``[*leading, N, *rest]``; other entries of the axis stay in place."""
    if axis is BATCH:
        return x.unsqueeze(leading)
    dim = leading + axis.dim
    outer = x.shape[dim] // (n * axis.inner)
    if outer == axis.inner == 1:
        return (x.movedim(dim, leading) if axis.dim else x).unsqueeze(dim + 1)
    return x.unflatten(dim, (outer, n, axis.inner)).movedim(dim + 1, leading).flatten(dim + 1, dim + 2)


def back(x: Tensor, axis: Axis, shape: Sequence[int], n: int, leading: int = 0) -> Tensor:
    """The inverse of :func:`front`: ``[*leading, *shape]``."""
    if axis is BATCH:
        return x.squeeze(leading)
    dim = leading + axis.dim
    outer = shape[axis.dim] // (n * axis.inner)
    x = x.unflatten(dim + 1, (outer, axis.inner)).movedim(leading, dim + 1)
    return x.reshape(*x.shape[:leading], *shape)


def labels(shape: Sequence[int], axis: Axis, n: int, device: Any = None) -> Tensor:
    """The sample that each entry belongs to, broadcastable to ``shape``."""
    if axis is BATCH:
        return torch.zeros([1] * len(shape), dtype=torch.long, device=device)
    place = torch.arange(shape[axis.dim], device=device) // axis.inner % n
    return place.view(-1, *[1] * (len(shape) - axis.dim - 1))


def masked(columns: Tensor, axis: Axis, n: int, samples: slice = slice(None)) -> Tensor:
    """Columns ``[V, *shape]`` of a tensor that holds the samples, as a shared one's: ``[V, N, *shape]``."""
    if axis is BATCH:
        return columns.unsqueeze(1)
    mine = labels(columns.shape[1:], axis, n, columns.device)
    every = torch.arange(n, device=columns.device)[samples].view(-1, *[1] * (columns.dim() - 1))
    return torch.where(mine == every, columns.unsqueeze(1), columns.new_zeros(()))


def apart(products: Tensor, axis: Axis, n: int, shape: Sequence[int]) -> Tensor:
    """Products ``[V, *output]`` summed to the ``shape`` that was broadcast, samples apart: ``[V, N, *shape]``."""
    split = front(products, axis, n, 1)
    padded = [1] * (products.dim() - 1 - len(shape)) + list(shape)
    return split.sum_to_size([*split.shape[:2], *padded]).reshape(*split.shape[:2], *shape)
