"""Convolutions: y is linear in input and weight, so the wave goes back as the gradient does, past squared factors.

h_x = (W∘W)ᵀ ⋆ h and h_W = (x∘x) ⋆ h: convolution's own backward, given the squares of its input and weight. A term of y
is one weight entry times one input entry, and no two terms of one output entry share either (x with itself shifted
meets different weights), so every entry of J is one entry of the other factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..axes import front
from ..graph import Operation
from ..persample import Dense, Outer, PerSample
from ..registry import rule
from .structure import factor_fixed

Waves = Sequence[Tensor | None] | None


@rule("ConvolutionBackward0", "ConvolutionOverrideableBackward0", linear=True, additive=factor_fixed(0, 1))
def convolution(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = W ⋆ x + b, also transposed: h_x = (W∘W)ᵀ ⋆ h, h_W = (x∘x) ⋆ h, h_b = Σ h."""
    if h is None:
        return None
    node: Any = op.node  # op.input and op.groups are no saved values
    geometry = (op.stride, op.padding, op.dilation, op.transposed, op.output_padding, node._saved_groups)
    return _backward(op, h, node._saved_input, op.weight, geometry)


@rule(
    *("MkldnnConvolutionBackward0", "ConvDepthwise2DBackward0"),
    *("ConvDepthwise3DBackward0", "SlowConv2DBackward0", "SlowConv3DBackward0"),
    *("SlowConvDilated2DBackward0", "SlowConvDilated3DBackward0"),
    *("SlowConvTranspose2DBackward0", "SlowConvTranspose3DBackward0"),
    *("CudnnConvolutionBackward0", "CudnnConvolutionTransposeBackward0", "MpsConvolutionBackward0"),
    *("MiopenConvolutionBackward0", "MiopenConvolutionTransposeBackward0", "MiopenDepthwiseConvolutionBackward0"),
    linear=True,
)
def kernel(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = W ⋆ x + b by one library's kernel, called directly: as convolution; what it has no setting for is plain."""
    if h is None:
        return None
    weight, transposed, plain = op.weight, "Transpose" in op.name, [0] * len(op.stride)
    geometry = (
        op.stride,
        op.padding,
        getattr(op, "dilation", [1] * len(plain)),
        transposed,
        getattr(op, "output_padding", plain),
        getattr(op.node, "_saved_groups", 1 if transposed else op.self.shape[1 - weight.dim()] // weight.shape[1]),
    )
    return _backward(op, h, op.self, weight, geometry)


def _backward(op: Operation, h: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Waves:
    """Convolution's backward at squared factors; of one that no needed wave depends on it sees the shape only."""
    needs_x, needs_weight, needs_bias = needs = [*op.needs, False][:3]
    x, weight = x * x if needs_weight else x, weight * weight if needs_x else weight
    bias = [h.shape[1]] if needs_bias else None
    return torch.ops.aten.convolution_backward(h, x, weight, bias, *geometry, needs)


@rule("ConvTbcBackward0", linear=True)
def conv_tbc(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = W ⋆ x + b over time, batch and channels: as convolution."""
    if h is None:
        return None
    return torch.ops.aten.conv_tbc_backward(h, op.self.square(), op.weight.square(), op.bias, op.pad)


@rule("ConvolutionBackward0", wave="factor")
def convolution_factor(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """S_x = Wᵀ ⋆ S: convolution's own backward, of all columns in one batch."""
    if any(wanted[1:]):  # between shared tensors: the node's own, column by column
        return [torch.stack(rows) if wanted[i] else None for i, rows in enumerate(zip(*map(op.vjp, s), strict=True))]
    node: Any = op.node
    x = s.new_empty(1).expand(s.shape[0] * s.shape[1], *op.inputs[0].shape[1:])  # only its shape is used
    geometry = (op.stride, op.padding, op.dilation, op.transposed, op.output_padding, node._saved_groups)
    found = torch.ops.aten.convolution_backward(s.flatten(0, 1), x, op.weight, None, *geometry, [True, False, False])
    return found[0].unflatten(0, s.shape[:2]), *[None] * (len(op.edges) - 1)


@rule("ConvolutionBackward0", wave="shared")
def convolution_shared(op: Operation, s: Tensor, wanted: Sequence[bool]) -> dict[int, PerSample]:
    """W gets Σ over positions of wave ⊗ patch of x (transposed: of patch of the wave ⊗ x), b gets Σ over positions."""
    axis, n = op.axes_out[0], op.n_samples
    if axis.dim > 0:  # the channels tell the samples apart
        return {}
    found: dict[int, PerSample] = {}
    if wanted[1]:
        found[1] = _outer(op, s)
    if len(wanted) > 2 and wanted[2]:
        sums = s.flatten(3).sum(3) if s.dim() > 3 else s
        found[2] = Dense(front(sums, axis, n, 1).sum(2))
    return found


def _outer(op: Operation, s: Tensor) -> Outer:
    node: Any = op.node
    x, shape, groups = node._saved_input, tuple(op.weight.shape), node._saved_groups
    if op.transposed:
        s = _patches(s.flatten(0, 1), op, x.shape[2:]).unflatten(0, s.shape[:2])
        x = x.unflatten(1, (groups, -1)).flatten(3)
    else:
        s, x = s.unflatten(2, (groups, -1)).flatten(4), _patches(x, op, s.shape[3:])
    return Outer(_by_sample(op, s, 1), _by_sample(op, x, 0), shape, flipped=op.transposed)


def _patches(x: Tensor, op: Operation, positions: Sequence[int]) -> Tensor:
    """What every position's kernel sees, ``[B, G, I, T]`` with I = channels of a group × kernel."""
    kernel = op.weight.shape[2:]
    if any(op.padding):
        x = F.pad(x, [p for size in reversed(op.padding) for p in (size, size)])
    for d, (size, count) in enumerate(zip(kernel, positions, strict=True)):
        windows = x.unfold(2 + d, (size - 1) * op.dilation[d] + 1, op.stride[d])
        x = windows.narrow(2 + d, 0, count)[..., :: op.dilation[d]]
    d = len(kernel)
    x = x.permute(0, 1, *range(2 + d, 2 + 2 * d), *range(2, 2 + d)).flatten(2 + d)  # B C *kernel T
    groups: int = op.node._saved_groups  # type: ignore[attr-defined]
    return x.unflatten(1, (groups, -1)).flatten(2, -2)


def _by_sample(op: Operation, x: Tensor, leading: int) -> Tensor:
    """``[*, B, G, F, T]`` as ``[*, N, G, T', F]``: positions of all rows of a sample together."""
    rows = front(x, op.axes_out[0], op.n_samples, leading)  # [*, N, B', G, F, T]
    if rows.shape[leading + 1] == 1:
        return rows.squeeze(leading + 1).mT
    return rows.movedim(leading + 1, -2).flatten(-2).mT
