"""Pooling: maxima select entries; means divide by the size of a window, which need not be that of another."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .structure import selection

selection(
    "AdaptiveMaxPool2DBackward0",
    "AdaptiveMaxPool3DBackward0",
    "FractionalMaxPool2DBackward0",
    "FractionalMaxPool3DBackward0",
    "MaxPool2DWithIndicesBackward0",
    "MaxPool3DWithIndicesBackward0",
    "MaxUnpool2DBackward0",
    "MaxUnpool3DBackward0",
)


@rule("AvgPool2DBackward0", "AvgPool3DBackward0", linear=True)
def average(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """yₒ = Σ x / dₒ over a window, dₒ its divisor: h_x = Jᵀ (h / d)."""
    return None if h is None else op.vjp(h * _reciprocal_divisor(op))[0]


def _reciprocal_divisor(op: Operation) -> Tensor | float:
    """1/dₒ: a constant unless windows overlap an edge; then a pooled tensor of ones over its count of entries."""
    if op.divisor_override:
        return 1 / op.divisor_override
    kernel = op.kernel_size
    spatial = op.self.shape[-len(kernel) :]
    if not op.ceil_mode and (op.count_include_pad or not any(op.padding)):
        return 1 / prod(kernel)
    pool = torch.ops.aten.avg_pool2d if len(kernel) == 2 else torch.ops.aten.avg_pool3d
    settings = (op.kernel_size, op.stride, op.padding, op.ceil_mode, op.count_include_pad)
    ones = torch.ones((1, *spatial), dtype=torch.promote_types(op.self.dtype, torch.float32), device=op.self.device)
    return (pool(ones, *settings) / pool(ones, *settings, 1).clamp_min(1)).to(op.self.dtype)


@rule("AdaptiveAvgPool2DBackward0", "AdaptiveAvgPool3DBackward0", linear=True)
def adaptive_average(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """yₒ = Σ x / dₒ over a bin, dₒ its size: h_x = Jᵀ (h / d)."""
    if h is None:
        return None
    leading = 2 if op.name.startswith("AdaptiveAvgPool2D") else 3
    for axis in range(-leading, 0):
        h = h / _bin_sizes(op.self.shape[axis], h.shape[axis], h).view(-1, *[1] * (-axis - 1))
    return op.vjp(h)[0]


def _bin_sizes(n: int, bins: int, like: Tensor) -> Tensor:
    """Bin k of n entries goes from ⌊k n/bins⌋ to ⌈(k+1) n/bins⌉."""
    k = torch.arange(bins, device=like.device)
    return (-(-(k + 1) * n // bins) - k * n // bins).to(like.dtype)


@rule(
    *("MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0"),
    *("AdaptiveMaxPool2DBackward0", "AdaptiveMaxPool3DBackward0"),
    wave="factor",
)
def max_pool_factor(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """Every output entry's column goes to the place of the maximum, all columns in one step."""
    d = 2 if "2D" in op.name else 3
    places = op.result1.flatten(-d).expand(*s.shape[:-d], -1)
    below = s.new_zeros(len(s), *op.inputs[0].shape)
    below.flatten(-d).scatter_add_(-1, places, s.flatten(-d))
    return (below,)


@rule(
    "AvgPool2DBackward0", "AvgPool3DBackward0", "AdaptiveAvgPool2DBackward0", "AdaptiveAvgPool3DBackward0",
    wave="factor",
)  # fmt: skip
def average_factor(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """The pool's own backward, of all columns in one batch."""
    d, shape = (2 if "2D" in op.name else 3), op.inputs[0].shape
    batch = s.reshape(-1, *s.shape[-d - 1 :])
    x = s.new_empty(1).expand(len(batch), *shape[-d - 1 :])  # only its shape is used
    adaptive, settings = op.name.startswith("Adaptive"), cast(tuple[Any, ...], ())
    if not adaptive:
        settings = (op.kernel_size, op.stride, op.padding, op.ceil_mode, op.count_include_pad, op.divisor_override)
    backward = getattr(torch.ops.aten, f"{'_adaptive_' if adaptive else ''}avg_pool{d}d_backward")
    return (backward(batch, x, *settings).view(len(s), *shape),)
