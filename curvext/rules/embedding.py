"""Embeddings: rows of a weight are copied, or summed within bags.

J is the Jacobian that the node's own backward has, so that curvature belongs to ``p.grad``: nothing reaches the row of
``padding_idx``, and ``scale_grad_by_freq`` divides what a row gets from each of its uses by the number of its uses.
With that option every entry of J is divided by it, so the diagonal is divided by its square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..axes import front, labels
from ..graph import Operation
from ..persample import Dense, PerSample
from ..registry import rule
from ..rows import Rows
from .structure import scaling, select

SUM, MEAN, MAX = range(3)  # modes of EmbeddingBag, as its node saves them


scaling("EmbeddingDenseBackwardBackward0")


@rule("EmbeddingBackward0", linear=True)
def embedding(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """Each output row is a copy of a row of W: h_W = Jᵀ h, divided by uses once more with scale_grad_by_freq."""
    if h is None or not op.scale_grad_by_freq:
        return select(op, g, h)
    rows = int(op.weight_sym_argsize_0)
    wave = torch.ops.aten.embedding_dense_backward(h, op.indices, rows, op.padding_idx, False)
    return wave / _uses(op.indices.flatten(), rows, h).square().unsqueeze(1)


@rule("EmbeddingBackward0", wave="shared")
def embedding_shared(op: Operation, s: Tensor, wanted: Sequence[bool]) -> dict[int, PerSample]:
    """Each row gets the waves of the places where it was looked up, apart by sample; that of padding gets none."""
    axis, n, indices = op.axes_out[0], op.n_samples, op.indices
    if axis.dim >= indices.dim():
        return {}
    s = s * (indices != op.padding_idx).unsqueeze(-1)
    if op.scale_grad_by_freq:
        s = s / _uses(indices.flatten(), int(op.weight_sym_argsize_0), s)[indices].unsqueeze(-1)
    waves = front(s, axis, n, 1).reshape(len(s), n, -1, s.shape[-1])
    return {0: Rows(waves, front(indices, axis, n).reshape(n, -1), tuple(op.inputs[0].shape))}


def _uses(indices: Tensor, rows: int, like: Tensor) -> Tensor:
    """How often each row is used, 1 where it is not."""
    return like.new_zeros(rows).index_add(0, indices, like.new_ones(indices.shape)).clamp(min=1)


@rule("EmbeddingBagBackward0", linear=True)
def embedding_bag(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """y_b = Σ_p w_p W[v_p] over the bag b: h_W[v] = Σ_b (Σ_{p in b, v_p = v} w_p)² h_b, h_w[p] = Σ_d h_bd W[v_p]_d².

    A row that is several times in a bag has the sum of its weights as slope, hence for each place p the product of w_p
    and that sum. The mean has w_p = 1 / |b|; the maximum is a selection.
    """
    if h is None or op.mode == MAX:
        return select(op, g, h)
    indices, bag, used = _places(op, h)
    wave = weight = None
    if op.needs[0]:
        slopes = _slopes(op, bag, used, h)
        rows = int(op.weight_sym_argsize_0)
        slope = slopes * _within(bag * rows + indices, slopes)
        wave = h.new_zeros(rows, h.shape[1]).index_add(0, indices, slope.unsqueeze(1) * h[bag])
    if len(op.needs) > 1 and op.needs[1]:
        weight = used * (h[bag] * op.weight[indices].square()).sum(1)
    return wave, weight


@rule("EmbeddingBagBackward0", wave="shared")
def embedding_bag_shared(op: Operation, s: Tensor, wanted: Sequence[bool]) -> dict[int, PerSample]:
    """A row gets the waves of its bags times its slope there, and an entry's weight ⟨s_b, W[v]⟩, apart by sample."""
    axis, n, rows = op.axes_out[0], op.n_samples, int(op.weight_sym_argsize_0)
    if axis.dim > 0:
        return {}
    sample = labels(s.shape[1:], axis, n, s.device).expand(s.shape[1:])
    shape, found = (len(s), n * rows, s.shape[2]), dict[int, PerSample]()
    if op.mode == MAX:
        full = (op.result2 != 0).unsqueeze(1)  # an empty bag has no maximum
        places = sample * rows + op.result3 * full
        table = s.new_zeros(shape).scatter_add_(1, places.expand(s.shape), s * full)
        return {0: Dense(table.unflatten(1, (n, rows)))}
    indices, bag, used = _places(op, s)
    sample, waves = sample[bag, 0], s[:, bag]
    if wanted[0]:
        waves_of_rows = waves * _slopes(op, bag, used, s[0]).unsqueeze(1)
        table = s.new_zeros(shape).index_add_(1, sample * rows + indices, waves_of_rows)
        found[0] = Dense(table.unflatten(1, (n, rows)))
    if len(wanted) > 1 and wanted[1]:
        every = torch.arange(n, device=s.device).unsqueeze(1)
        found[1] = Dense(torch.where(sample == every, (used * (waves * op.weight[indices]).sum(2)).unsqueeze(1), 0))
    return found


def _places(op: Operation, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every entry its row, its bag, and 1, or 0 if it is padding."""
    indices, offsets = op.indices, op.offsets
    # as the backward pass, it cannot rely on what the kernel saved: some save no bags and some no sizes
    bag = torch.searchsorted(offsets, torch.arange(len(indices), device=offsets.device), right=True) - 1
    return indices, bag, (indices != op.padding_idx).to(like.dtype)


def _slopes(op: Operation, bag: Tensor, used: Tensor, h: Tensor) -> Tensor:
    """The weight of each place in its bag's output, as the backward pass has it."""
    weights = op.per_sample_weights
    slopes = used if weights is None else used * weights
    if op.mode == MEAN:
        slopes = slopes / h.new_zeros(len(h)).index_add(0, bag, used).clamp(min=1)[bag]
    if op.scale_grad_by_freq:
        slopes = slopes * _scales(op, bag, h)[op.indices]
    return slopes


def _scales(op: Operation, bag: Tensor, h: Tensor) -> Tensor:
    """What the backward pass scales each row by, asked of itself: on a CPU it takes the uses of another row."""
    rows, ones, zeros = int(op.weight_sym_argsize_0), h.new_ones(len(h), 1), bag.new_zeros(len(h))
    scaled = torch.ops.aten._embedding_bag_dense_backward(
        ones, op.indices, bag, zeros, zeros, rows, True, SUM, None, op.padding_idx
    )
    return scaled.squeeze(1) / _uses(op.indices, rows, h)


def _within(keys: Tensor, values: Tensor) -> Tensor:
    """For each place the sum of the values at all places of equal key, in sizes that do not depend on the data."""
    ordered, order = keys.sort()
    first = torch.cat([ordered.new_zeros(min(1, len(keys))), (ordered.diff() != 0).long()])
    number = torch.zeros_like(keys).index_copy(0, order, first.cumsum(0))
    return torch.zeros_like(values).index_add(0, number, values)[number]
